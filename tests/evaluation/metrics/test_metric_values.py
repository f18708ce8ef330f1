"""Metrics against independent derivations: numpy loops, scipy's matrix root, motion that is known exactly.

Those that need a fetched network skip without it, and say which.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.datasets import load_sample_image

from qvgen.config.leaves import leaf_names, load_leaf
from qvgen.errors import UserError
from qvgen.evaluation.metrics import motion_compensated_error
from qvgen.evaluation.metrics.base import Clip, ComparedCall, ModelMetric, Pair, SetMetric, VideoMetric
from qvgen.evaluation.metrics.fvd import frechet_distance
from qvgen.evaluation.metrics.kvd import kernel_distance
from qvgen.evaluation.metrics.motion_compensation import unexplained_change
from qvgen.evaluation.metrics.warping_error import warping_error
from qvgen.evaluation.networks import fetched
from tests import oracles_metrics as oracles
from tests.evaluation.injected_damage import DAMAGE
from tests.evaluation.small_clip import make_clip_folder

NETWORKS = {"lpips": fetched.LPIPS, "flow_difference": fetched.RAFT, "flow_score": fetched.RAFT}
NETWORKS |= {
    "warping_error": fetched.RAFT,
    "motion_compensated_error": fetched.RAFT,
    "fvd": fetched.I3D,
    "kvd": fetched.I3D,
}


def needs(weights: fetched.Weights) -> pytest.MarkDecorator:
    return pytest.mark.skipif(weights.absent is not None, reason=f"not fetched: qvgen assets names=[{weights.asset}]")


def walk(frames: int = 4, *, side: int = 64, step: int = 2) -> torch.Tensor:
    """A photo that moves left by ``step`` pixels a frame, uint8 [F, side, side, 3]."""
    photo = torch.from_numpy(load_sample_image("china.jpg").copy())
    return torch.stack([photo[100 : 100 + side, 200 + step * f : 200 + step * f + side] for f in range(frames)])


def pair(video: torch.Tensor, reference: torch.Tensor | None = None, caption: str | None = None) -> Pair:
    return Pair(video=Clip(video), reference=None if reference is None else Clip(reference), caption=caption)


@pytest.mark.parametrize("name", leaf_names("metric"))
def test_a_metric_says_what_it_is(name: str) -> None:
    metric = load_leaf("metric", name)
    assert metric.title
    assert len(metric.source) > 20
    assert metric.low < metric.high
    assert metric.better in ("higher", "lower", "neither")
    assert set(metric.blind_to) <= set(DAMAGE)
    assert isinstance(metric, VideoMetric | SetMetric | ModelMetric)
    assert {weights.asset for weights in metric.weights} == ({NETWORKS[name].asset} if name in NETWORKS else set())
    assert all(len(weights.sha256) == 64 for weights in metric.weights)


def test_psnr_and_ssim_are_the_oracles() -> None:
    video, reference = DAMAGE["noise"](walk(), 2), walk()
    a, b = video.numpy(), reference.numpy()
    found = load_leaf("metric", "psnr").measure(pair(video, reference))
    assert found == pytest.approx(oracles.psnr_db(a, b, max_value=255), rel=1e-12)
    assert load_leaf("metric", "psnr").measure(pair(reference, reference)) == 100.0  # and not infinite
    found = load_leaf("metric", "ssim").measure(pair(video[:2, :24, :20], reference[:2, :24, :20]))
    assert found == pytest.approx(oracles.ssim(a[:2, :24, :20], b[:2, :24, :20], max_value=255), rel=1e-9)


def test_flickering_is_vbench_s_formula() -> None:
    video = walk().numpy()
    changes = [np.abs(video[f + 1].astype(float) - video[f].astype(float)).mean() for f in range(3)]
    metric = load_leaf("metric", "temporal_flickering")
    assert metric.measure(pair(walk())) == pytest.approx((255 - np.mean(changes)) / 255, rel=1e-12)
    with pytest.raises(ValueError, match="needs videos of 2 frames or more, and they have 1"):
        metric.measure(pair(walk(1)))


@needs(fetched.LPIPS)
def test_lpips_is_the_mean_of_its_frames() -> None:
    """The network itself is held to its definition in float64 by tests/evaluation/test_damage.py."""
    video, reference = DAMAGE["blur"](walk(), 1), walk()
    path = fetched.LPIPS.path
    assert path is not None
    network = fetched.load_lpips(path)
    frames = [
        float(network(*(x[f].permute(2, 0, 1)[None].float() / 127.5 - 1 for x in (video, reference)))) for f in range(4)
    ]
    assert load_leaf("metric", "lpips").measure(pair(video, reference)) == pytest.approx(np.mean(frames), rel=1e-6)


@needs(fetched.RAFT)
def test_flow_metrics_find_a_known_motion() -> None:
    """The whole frame moves by 2 and by 5 pixels: RAFT finds that but at the border, where new pixels come in."""
    slow, fast = walk(2, side=128), walk(2, side=128, step=5)
    assert load_leaf("metric", "flow_score").measure(pair(slow)) == pytest.approx(2, abs=0.2)
    found = load_leaf("metric", "flow_difference").measure(pair(fast, slow))
    assert found == pytest.approx(3 / (128 * 2**0.5), rel=0.15)
    assert load_leaf("metric", "warping_error").measure(pair(slow)) < 1e-3
    assert load_leaf("metric", "warping_error").measure(pair(DAMAGE["flicker"](slow, 4))) > 0.01


def warping_error_by_loops(frames: np.ndarray, flow: np.ndarray, backward: np.ndarray) -> float:
    """The definition, place by place."""
    means = []
    height, width = frames.shape[1:3]

    def at(image: np.ndarray, row: float, column: float) -> np.ndarray:
        top, left = min(int(row), height - 2), min(int(column), width - 2)
        y, x = row - top, column - left
        upper = (1 - x) * image[..., top, left] + x * image[..., top, left + 1]
        lower = (1 - x) * image[..., top + 1, left] + x * image[..., top + 1, left + 1]
        return np.asarray((1 - y) * upper + y * lower)

    for f in range(len(frames) - 1):
        errors = []
        now, after = (np.moveaxis(frames[f + i] / 255.0, -1, 0) for i in (0, 1))
        for row in range(height):
            for column in range(width):
                dx, dy = flow[f, :, row, column]
                if not (0 <= row + dy <= height - 1 and 0 <= column + dx <= width - 1):
                    continue
                back = at(backward[f], row + dy, column + dx)
                ahead = np.array([dx, dy])
                if ((ahead + back) ** 2).sum() > 0.01 * ((ahead**2).sum() + (back**2).sum()) + 0.5:
                    continue
                errors.append(((now[:, row, column] - at(after, row + dy, column + dx)) ** 2).mean())
        means.append(np.mean(errors) if errors else ((now - after) ** 2).mean())
    return float(np.mean(means))


def test_warping_error_is_its_definition() -> None:
    """Random flows: places that leave the frame, and others that the flow back does not confirm."""
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (3, 7, 9, 3), generator=generator, dtype=torch.uint8)
    flow = torch.randn(2, 2, 7, 9, generator=generator, dtype=torch.float64) * 1.5
    backward = -flow + 0.4 * torch.randn(2, 2, 7, 9, generator=generator, dtype=torch.float64)
    found = warping_error(frames, flow, backward)
    assert found == pytest.approx(warping_error_by_loops(frames.numpy(), flow.numpy(), backward.numpy()), rel=1e-9)
    nothing = flow + torch.tensor([100.0, 0.0], dtype=torch.float64).view(
        2, 1, 1, 1
    )  # between the first two is visible
    assert warping_error(frames, nothing, backward) == pytest.approx(
        warping_error_by_loops(frames.numpy(), nothing.numpy(), backward.numpy()), rel=1e-9
    )
    still = frames[:1].expand(3, -1, -1, -1)
    assert warping_error(still, torch.zeros_like(flow), torch.zeros_like(flow)) < 1e-30


def test_motion_compensated_error_is_the_warping_error_of_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under flows that are given: a difference that moves along is free; the definition by loops, of any difference."""
    generator = torch.Generator().manual_seed(2)
    videos = torch.randint(0, 256, (2, 3, 7, 9, 3), generator=generator, dtype=torch.uint8)
    flow = torch.randn(2, 2, 7, 9, generator=generator, dtype=torch.float64)
    flows = {False: flow, True: -flow}
    reference = Clip(videos[1])

    def given(clip: Clip, *, backward: bool = False) -> torch.Tensor:
        assert clip is reference
        return flows[backward]

    monkeypatch.setattr(motion_compensated_error, "flow_of", given)
    metric = load_leaf("metric", "motion_compensated_error")
    difference = videos[0].numpy().astype(float) - videos[1].numpy()
    expected = warping_error_by_loops(difference, flow.numpy(), -flow.numpy())
    found = metric.measure(Pair(video=Clip(videos[0]), reference=reference, caption=None))
    assert found == pytest.approx(expected, rel=1e-9)
    assert metric.measure(Pair(video=reference, reference=reference, caption=None)) == 0
    moved = torch.zeros(2, 3, 6, 8, dtype=torch.float64)
    moved[0, :, 2, 2:4], moved[1, :, 2, 3:5] = 1.0, 1.0  # one pixel to the right, as the flow says
    flow = torch.zeros(1, 2, 6, 8, dtype=torch.float64)
    flow[:, 0] = 1.0
    assert unexplained_change(moved, flow, -flow) == 0
    assert unexplained_change(moved, torch.zeros_like(flow), torch.zeros_like(flow)) > 0.04


def features(count: int, *, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


@pytest.mark.parametrize("count", [4, 30])
def test_frechet_distance_is_the_matrix_root_s(count: int) -> None:
    """Four rows of six features: singular covariances, of which scipy's root of a small multiple of 1 added is taken."""
    a, b = features(count, seed=1), features(count, seed=2, shift=0.5)
    ca, cb = (np.cov(x.numpy(), rowvar=False) + (1e-12 * np.eye(6) if count < 7 else 0) for x in (a, b))
    root = scipy.linalg.sqrtm(ca @ cb).real
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(ca + cb - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4 if count < 7 else 1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_its_double_sum() -> None:
    a, b = features(5, seed=1), features(4, seed=2, shift=0.5)

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return (float(x @ y) / 6 + 1) ** 3

    within = [np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]) for x in (a, b)]
    across = np.mean([kernel(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(sum(within) - 2 * across, rel=1e-10)


@needs(fetched.I3D)
def test_fvd_sees_another_set_and_not_the_same_one() -> None:
    metric = load_leaf("metric", "fvd")
    ours, theirs = (
        torch.stack([metric.features(Clip(clip)) for clip in clips])
        for clips in ([walk(step=s) for s in (1, 2)], [DAMAGE["noise"](walk(step=s), 4) for s in (1, 2)])
    )
    assert ours.dtype == torch.float64
    assert metric.distance(ours, ours) == pytest.approx(0, abs=1e-6)
    assert metric.distance(ours, theirs) > 1


def test_prediction_error_takes_the_calls_of_its_band() -> None:
    def call(timestep: float, *, off: float) -> ComparedCall:
        return ComparedCall(timestep=timestep, output=torch.full((1, 4), 2 + off), reference=torch.full((1, 4), 2.0))

    calls = [call(1000, off=1), call(700, off=0), call(500, off=0.5), call(333, off=0.25)]
    low, middle, high = (load_leaf("metric", f"prediction_error_{band}") for band in ("low", "middle", "high"))
    assert high.measure(calls) == pytest.approx(1 / 8)  # sums over both calls
    assert middle.measure(calls) == pytest.approx((0.25 + 0.0625) / 8)
    assert low.measure(calls) is None
    assert "timestep 667..1000" in high.title
    with pytest.raises(ValueError, match=r"band=\[5, 1\] is no band"):
        load_leaf("metric", "prediction_error_low", band=[5, 1])


def test_clip_metrics_are_the_model_s_own_cosines(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Frames of the tower's size: nothing to resize, so that the model can be called by hand."""
    from transformers import AutoTokenizer, CLIPModel

    folder = make_clip_folder(tmp_path_factory.mktemp("clip"))
    video, caption = walk(3, side=32), "a boat"
    sim, temp = (load_leaf("metric", name, folder=str(folder)) for name in ("clipsim", "clip_temp"))
    assert sim.absent() is None
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        found = model(
            **tokenizer([caption], return_tensors="pt"),
            pixel_values=(video.permute(0, 3, 1, 2).float() / 255 - 0.4) / 0.3,
        )
    images = torch.nn.functional.normalize(found.image_embeds, dim=-1)
    cosines = images @ torch.nn.functional.normalize(found.text_embeds, dim=-1)[0]
    assert sim.measure(pair(video, caption=caption)) == pytest.approx(float(cosines.mean()), rel=1e-5)
    with torch.no_grad():  # a wrong caption is another text; whether it scores less, only a trained model can say
        wrong = model.get_text_features(**tokenizer(["zebras"], return_tensors="pt"))
        wrong = wrong if isinstance(wrong, torch.Tensor) else wrong.pooler_output
    expected = float((images @ torch.nn.functional.normalize(wrong, dim=-1)[0]).mean())
    assert sim.measure(pair(video, caption="zebras")) == pytest.approx(expected, rel=1e-5)
    assert abs(expected - float(cosines.mean())) > 1e-3
    steps = [float(images[f] @ images[f + 1]) for f in range(2)]
    assert temp.measure(pair(video)) == pytest.approx(np.mean(steps), rel=1e-5)
    with pytest.raises(ValueError, match="needs the captions"):
        sim.measure(pair(video))


def test_a_network_that_is_not_there_is_named(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path_factory.mktemp("empty")
    monkeypatch.setenv("QVGEN_ASSETS", str(empty))
    for name, weights in NETWORKS.items():
        said = load_leaf("metric", name).absent()
        assert (
            said == f"{weights.asset}/{weights.file} is not there; fetch it with `qvgen assets names=[{weights.asset}]`"
        )
    assert "no folder of a CLIP" in load_leaf("metric", "clipsim").absent()
    assert load_leaf("metric", "clipsim", folder=str(empty)).absent() == f"{empty / 'config.json'} is not there"
    with pytest.raises(UserError, match="unknown metric=psnrr; did you mean 'psnr'"):
        load_leaf("metric", "psnrr")
