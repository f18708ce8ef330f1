"""I3D against the package that its weights come from, and what of a pickle is refused.

The logits below were computed once by that package (JAX 0.10, Flax 0.12, CPU; its statistics flattened to [C], as that Flax
needs it) on a video of three moving waves that is made here by a formula.
"""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional

from qvgen.data.assets import find_asset
from qvgen.evaluation.damage import visual_damage
from qvgen.evaluation.networks import i3d
from qvgen.evaluation.networks.i3d import I3d

needs_i3d = pytest.mark.skipif(find_asset(i3d.ASSET) is None, reason=f"not fetched: qvgen assets names=[{i3d.ASSET}]")

PUBLISHED = {  # frames -> the first six logits, the likeliest action and its logit
    16: ([-0.3140, 5.2800, 5.2952, 5.8735, -0.2483, 4.1976], 327, 11.2938),
    13: ([-1.6986, 7.7807, 8.3026, 8.0859, -0.9962, 3.0650], 157, 16.9818),
    9: ([-2.2206, 8.9557, 7.1566, 8.0718, -2.0394, 4.3034], 157, 19.8374),
}


def waves(frames: int, *, side: int = 224) -> torch.Tensor:
    """float32 [1, 3, F, side, side] in [-1, 1]."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(side), np.arange(side), indexing="ij")
    channels = [np.sin(x / 17 + t * 0.7 + c) * np.cos(y / 23 - t * 0.3 * c) for c in range(3)]
    return torch.from_numpy(np.stack(channels)[None].astype(np.float32))


def as_bytes(video: torch.Tensor) -> torch.Tensor:
    """uint8 [1, F, H, W, 3]."""
    return ((video + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)


@pytest.fixture(scope="module")
def network():
    return I3d.load(find_asset(i3d.ASSET) / i3d.FILE)


@needs_i3d
@pytest.mark.parametrize("frames", PUBLISHED)
def test_the_logits_are_those_of_the_published_port(network, frames):
    logits = network(waves(frames))[0]
    first, action, largest = PUBLISHED[frames]
    # 1e-3: four digits are written down; float32 sums of two libraries differed by 3e-5
    assert torch.allclose(logits[:6], torch.tensor(first), atol=1e-3)
    assert int(logits.argmax()) == action
    assert float(logits[action]) == pytest.approx(largest, abs=1e-3)


@needs_i3d
def test_short_and_small_videos_are_fitted(network):
    """Nine frames are needed: the last one is held. Other sizes are resized, whatever their shape."""
    short = waves(4)
    held = torch.cat((short, short[:, :, -1:].expand(-1, -1, 5, -1, -1)), 2)
    assert torch.equal(network(short), network(held))
    small = waves(9, side=64)[..., :48]
    frames = functional.interpolate(small[0].transpose(0, 1), size=(224, 224), mode="bilinear")
    assert torch.allclose(network(small), network(frames.transpose(0, 1)[None]), atol=1e-3)


@needs_i3d
def test_the_damage_is_the_squared_distance_of_the_logits_and_sees_time(network):
    damage = visual_damage("i3d")
    clean = as_bytes(waves(9))
    pixels = [video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1 for video in (clean, clean.flip(1))]
    exact = float((network(pixels[0]) - network(pixels[1])).double().square().sum())
    assert exact > 1  # the same frames in another order: no distance of single frames can see that
    both = damage.measure(torch.cat((clean, clean.flip(1))), torch.cat((clean, clean)), ["", ""])
    assert both == pytest.approx(exact / 2, rel=1e-5)  # the mean over videos, each by itself: an equal one has none


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "weights.ckpt"
    for content in (b"no pickle", pickle.dumps({"params": {}}), pickle.dumps([1, 2])):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"holds no I3D weights .*fetch the asset again"):
            I3d.load(path)


def test_a_pickle_that_asks_for_more_than_arrays_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    path = tmp_path / "weights.ckpt"
    path.write_bytes(pickle.dumps({"params": Evil(), "batch_stats": np.zeros(2)}))
    with pytest.raises(ValueError, match="it asks for .*open"):
        I3d.load(path)
    assert not (tmp_path / "made").exists()


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    names = ("Conv3d_1a_7x7",)
    unit = {"Conv_0": {"kernel": np.zeros((1, 1, 1, 3, 64), np.float32)}, "BatchNorm_0": {"bias": np.zeros(64)}}
    statistics = {"BatchNorm_0": {"mean": np.zeros(64), "var": np.ones(64)}}
    path = tmp_path / "weights.ckpt"
    path.write_bytes(
        pickle.dumps({"params": dict.fromkeys(names, unit), "batch_stats": dict.fromkeys(names, statistics)})
    )
    with pytest.raises(ValueError, match=r"shape \[64, 3, 1, 1, 1\] where \[64, 3, 7, 7, 7\] belongs"):
        I3d.load(path)
