"""DOVER against the published names and shapes, and, with a small network of random weights, its definition in float64.

The definition is written here in numpy from VQAssessment/DOVER and its papers: every window and every pair of places by
itself. The real weights were not at hand.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qvgen.config.leaves import load_leaf
from qvgen.evaluation.metrics.base import Clip, Pair
from qvgen.evaluation.metrics.dover import Dover as DoverMetric
from qvgen.evaluation.networks.dover.convnext import ConvNextSizes
from qvgen.evaluation.networks.dover.network import Dover, DoverSizes, fragments, frame_numbers, load_dover, view_of
from qvgen.evaluation.networks.dover.swin import VideoSwinSizes
from tests.evaluation.networks.float64_layers import Weights, attention, gelu, layer_norm, linear, random_file, under
from tests.evaluation.vbench import published_networks

SMALL = DoverSizes(
    convnext=ConvNextSizes(widths=(4, 6, 8, 10), blocks=(2, 1, 2, 1)),
    swin=VideoSwinSizes(width=4, blocks=(2, 2, 1, 2), heads=(1, 2, 2, 4), window=(2, 3, 3)),
    hidden=5,
    frames=8,
    clips=2,
)
MEAN, STD = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])


def _two(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def published_shapes(s: DoverSizes, *, index: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published checkpoint, for these sizes."""
    shapes: dict[str, tuple[int, ...]] = {}
    widths, name = s.convnext.widths, "aesthetic_backbone"
    for stage, width in enumerate(widths):
        conv, norm = (f"{name}.downsample_layers.{stage}.{part}" for part in ((0, 1) if stage == 0 else (1, 0)))
        before = 3 if stage == 0 else widths[stage - 1]
        shapes[f"{conv}.weight"] = (width, before, *((2, 4, 4) if stage == 0 else (1, 2, 2)))
        shapes[f"{conv}.bias"] = (width,)
        shapes |= _norm(norm, width if stage == 0 else before)
        for number in range(s.convnext.blocks[stage]):
            block = f"{name}.stages.{stage}.{number}"
            shapes[f"{block}.gamma"] = (width,)
            shapes |= {
                f"{block}.dwconv.weight": (width, 1, (1, 3, 1)[number % 3], 7, 7),
                f"{block}.dwconv.bias": (width,),
            }
            shapes |= _norm(f"{block}.norm", width) | _two(f"{block}.pwconv1", 4 * width, width)
            shapes |= _two(f"{block}.pwconv2", width, 4 * width)
    shapes |= _norm(f"{name}.norm", widths[-1])
    swin, name = s.swin, "technical_backbone"
    shapes |= {
        f"{name}.patch_embed.proj.weight": (swin.width, 3, 2, 4, 4),
        f"{name}.patch_embed.proj.bias": (swin.width,),
    }
    shapes |= _norm(f"{name}.patch_embed.norm", swin.width)
    places, length = int(np.prod([2 * w - 1 for w in swin.window])), int(np.prod(swin.window))
    for stage, count in enumerate(swin.blocks):
        width = swin.width * 2**stage
        for number in range(count):
            block = f"{name}.layers.{stage}.blocks.{number}"
            for table in ("relative", "fragment")[: 1 if stage == 3 else 2]:
                shapes[f"{block}.attn.{table}_position_bias_table"] = (places, swin.heads[stage])
            if index:
                shapes[f"{block}.attn.relative_position_index"] = (length, length)
            shapes |= _two(f"{block}.attn.qkv", 3 * width, width) | _two(f"{block}.attn.proj", width, width)
            shapes |= _two(f"{block}.mlp.fc1", 4 * width, width) | _two(f"{block}.mlp.fc2", width, 4 * width)
            shapes |= _norm(f"{block}.norm1", width) | _norm(f"{block}.norm2", width)
        if stage < 3:
            halving = f"{name}.layers.{stage}.downsample"
            shapes |= {f"{halving}.reduction.weight": (2 * width, 4 * width), **_norm(f"{halving}.norm", 4 * width)}
    shapes |= _norm(f"{name}.norm", 8 * swin.width)
    for branch, width in (("aesthetic", widths[-1]), ("technical", 8 * swin.width)):
        head = f"{branch}_head"
        shapes |= {f"{head}.fc_hid.weight": (s.hidden, width, 1, 1, 1), f"{head}.fc_hid.bias": (s.hidden,)}
        shapes |= {f"{head}.fc_last.weight": (1, s.hidden, 1, 1, 1), f"{head}.fc_last.bias": (1,)}
    return shapes


def strided(clip: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    """A convolution whose stride is its kernel, of [F, H, W, C]."""
    kernel = weights[f"{name}.weight"]
    f, h, w = kernel.shape[2:]
    frames, height, width, channels = clip.shape
    parts = clip.reshape(frames // f, f, height // h, h, width // w, w, channels)
    return np.einsum("afbhcwk,okfhw->abco", parts, kernel) + weights[f"{name}.bias"]


def convnext(clip: np.ndarray, weights: Weights, s: ConvNextSizes) -> np.ndarray:
    x = clip
    for stage, count in enumerate(s.blocks):
        layer = f"downsample_layers.{stage}"
        if stage == 0:
            x = layer_norm(strided(x, weights, f"{layer}.0"), weights, f"{layer}.1", eps=1e-6)
        else:
            x = strided(layer_norm(x, weights, f"{layer}.0", eps=1e-6), weights, f"{layer}.1")
        for number in range(count):
            block = under(weights, f"stages.{stage}.{number}.")
            kernel = block["dwconv.weight"][:, 0]
            around = kernel.shape[1] // 2
            padded = np.pad(x, ((around, around), (3, 3), (3, 3), (0, 0)))
            y = np.zeros_like(x) + block["dwconv.bias"]
            for f, h, w in itertools.product(*map(range, kernel.shape[1:])):
                y += padded[f : f + x.shape[0], h : h + x.shape[1], w : w + x.shape[2]] * kernel[:, f, h, w]
            y = gelu(linear(layer_norm(y, block, "norm", eps=1e-6), block, "pwconv1"))
            x = x + block["gamma"] * linear(y, block, "pwconv2")
    return layer_norm(x, weights, "norm", eps=1e-6)


def window_attention(y: np.ndarray, block: Weights, *, window: tuple, moved: tuple, heads: int) -> np.ndarray:
    """Attention of maps [F, H, W, C], window by window; a place is known by where it lies before the map is rolled."""
    box, found = np.array(y.shape[:3]), np.zeros_like(y)
    steps = np.array(list(itertools.product(*map(range, window))))
    row = np.zeros((len(steps), len(steps)), dtype=int)
    for axis, size in enumerate(window):
        row = row * (2 * size - 1) + steps[:, None, axis] - steps[None, :, axis] + size - 1
    for start in itertools.product(*(range(0, length, size) for length, size in zip(box, window, strict=True))):
        places = steps + start
        real = (places + moved) % box
        fragment = real * window // box
        distance = sum(np.abs(fragment[:, None, axis] - fragment[None, :, axis]) for axis in (1, 2))[..., None]
        bias = block["attn.relative_position_bias_table"][row]
        if "attn.fragment_position_bias_table" in block:
            bias = distance * bias + (1 - distance) * block["attn.fragment_position_bias_table"][row]
        came_round = places + moved >= box
        apart = (came_round[:, None] != came_round[None, :]).any(-1)
        rows = linear(np.array([y[tuple(place)] for place in real]), block, "attn.qkv")
        query, key, value = np.split(rows, 3, -1)
        added = bias.transpose(2, 0, 1) - 100 * apart
        mixed = linear(attention(query, key, value, heads=heads, added=added), block, "attn.proj")
        for place, vector in zip(real, mixed, strict=True):
            found[tuple(place)] = vector
    return found


def swin(clip: np.ndarray, weights: Weights, s: VideoSwinSizes) -> np.ndarray:
    x = layer_norm(strided(clip, weights, "patch_embed.proj"), weights, "patch_embed.norm", eps=1e-5)
    for stage, count in enumerate(s.blocks):
        for number in range(count):
            block = under(weights, f"layers.{stage}.blocks.{number}.")
            moved = tuple(w // 2 if number % 2 and n > w else 0 for w, n in zip(s.window, x.shape[:3], strict=True))
            window = tuple(min(pair) for pair in zip(s.window, x.shape[:3], strict=True))
            y = layer_norm(x, block, "norm1", eps=1e-5)
            x = x + window_attention(y, block, window=window, moved=moved, heads=s.heads[stage])
            x = x + linear(gelu(linear(layer_norm(x, block, "norm2", eps=1e-5), block, "mlp.fc1")), block, "mlp.fc2")
        if stage < len(s.blocks) - 1:
            parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
            layer = f"layers.{stage}.downsample"
            x = linear(
                layer_norm(np.concatenate(parts, -1), weights, f"{layer}.norm", eps=1e-5), weights, f"{layer}.reduction"
            )
    return layer_norm(x, weights, "norm", eps=1e-5)


def raw_score(view: Tensor, weights: Weights, branch: str, s: DoverSizes) -> float:
    """Mean over clips and places of a head."""
    numbers = []
    for clip in view.double().permute(0, 2, 3, 4, 1).numpy():
        inner = under(weights, f"{branch}_backbone.")
        x = convnext(clip, inner, s.convnext) if branch == "aesthetic" else swin(clip, inner, s.swin)
        head = {
            name: value.squeeze((2, 3, 4)) if value.ndim == 5 else value
            for name, value in under(weights, f"{branch}_head.").items()
        }
        numbers.append(linear(gelu(linear(x, head, "fc_hid")), head, "fc_last"))
    return float(np.mean(numbers))


class SmallDover(DoverMetric):
    """The metric with a small network."""

    sizes = SMALL


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    path = tmp_path_factory.mktemp("weights") / "DOVER.pth"
    return path, random_file(published_shapes(SMALL, index=True), path, key=None)


def random_frames(frames: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=generator)


def test_the_network_has_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        network = Dover(DoverSizes())
        found = {name: tuple(value.shape) for name, value in network.state_dict().items()}
        features = [network.aesthetic_backbone, network.technical_backbone]
        maps = {tuple(backbone(torch.empty(1, 3, 32, 224, 224)).shape) for backbone in features}
    assert found == published_shapes(DoverSizes(), index=False)
    assert maps == {(1, 768, 16, 7, 7)}  # no number is computed on this device


@pytest.mark.parametrize(("branch", "mean", "std"), [("aesthetic", -0.08285, 0.03774), ("technical", 0.1107, 0.07355)])
def test_a_score_is_that_of_the_definition(stored: tuple[Path, Weights], branch: str, mean: float, std: float) -> None:
    path, weights = stored
    frames = random_frames(20, 100, 130)
    view = view_of(frames, branch, sizes=SMALL)
    raw, expected = load_dover(path, sizes=SMALL).score(view, branch), raw_score(view, weights, branch, SMALL)
    assert raw == pytest.approx(expected, rel=2e-4, abs=2e-5)  # float32 through 20 layers
    turned = load_dover(path, sizes=SMALL).score(view.flip(3), branch)
    assert abs(turned - expected) > 100 * abs(raw - expected)  # the place of a pixel counts
    metric = SmallDover(branch=branch, weights=str(path.parent))
    assert metric.absent() is None
    value = metric.measure(Pair(video=Clip(frames), reference=None, caption=None))
    assert value == pytest.approx(1 / (1 + np.exp(-(raw - mean) / std)), rel=1e-12)


def test_safetensors_give_the_same_and_another_file_is_refused(stored: tuple[Path, Weights], tmp_path: Path) -> None:
    path, weights = stored
    tensors = {name: torch.from_numpy(value).float().contiguous() for name, value in weights.items()}
    save_file(tensors, tmp_path / "DOVER.safetensors")
    view = view_of(random_frames(9, 96, 96), "technical", sizes=SMALL)
    files = (path, tmp_path / "DOVER.safetensors")
    assert len({load_dover(file, sizes=SMALL).score(view, "technical") for file in files}) == 1
    save_file({**tensors, "more": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="has an unexpected more; give the checkpoint of Dover"):
        load_dover(tmp_path / "other.safetensors", sizes=SMALL)


def test_frames_are_those_of_the_published_sampler() -> None:
    """Without a place to draw: 32 of 81 are one of each part of 2; three clips of 16 frames go round."""
    generator = torch.Generator().manual_seed(0)
    assert frame_numbers(81, parts=32, length=1, generator=generator).tolist() == [2 * part for part in range(32)]
    clips = frame_numbers(16, parts=3, length=32, generator=generator).view(3, 32)
    assert clips[1, :8].tolist() == [5, 7, 9, 11, 13, 15, 1, 3]
    assert frame_numbers(16, parts=32, length=1, generator=generator).tolist() == [0] * 32
    drawn = frame_numbers(400, parts=3, length=32, generator=generator).view(3, 32)
    assert all(133 * part <= int(clip[0]) < 133 * part + 69 for part, clip in enumerate(drawn))  # 133 - 64
    assert {int(step) for step in drawn.diff(dim=1).flatten()} == {2}


def test_a_fragment_is_cut_whole_from_its_cell() -> None:
    """The levels say where a pixel lies; cells are 40 x 60, so a fragment begins in the first 8 rows and 28 columns."""
    rows, columns = torch.meshgrid(torch.arange(120), torch.arange(180), indexing="ij")
    clip = torch.stack([rows, columns, rows]).to(torch.uint8).unsqueeze(1).expand(3, 4, 120, 180)
    found = fragments(clip, sizes=SMALL, generator=torch.Generator().manual_seed(1))
    assert found.shape == (3, 4, 96, 96)
    starts = set()
    for row, column in itertools.product(range(3), repeat=2):
        part = found[:, :, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32].int()
        top, left = int(part[0, 0, 0, 0]), int(part[1, 0, 0, 0])
        assert 40 * row <= top < 40 * row + 8
        assert 60 * column <= left < 60 * column + 28
        assert torch.equal(part, clip[:, :, top : top + 32, left : left + 32].int())
        starts.add((top - 40 * row, left - 60 * column))
    assert len(starts) > 4


def test_views_are_resized_as_published() -> None:
    """Without antialiasing: rounded levels for the aesthetic view, cut ones for small frames of the technical view."""
    frames = random_frames(8, 48, 64)
    images = frames.permute(0, 3, 1, 2).double()
    steps = (48 / 96, 64 / 96)
    resized = torch.stack([published_networks.resize(image, (96, 96), steps, cubic=False) for image in images])
    view = view_of(frames, "aesthetic", sizes=SMALL)
    assert view.shape == (1, 3, 8, 96, 96)
    levels = view[0].double().transpose(0, 1) * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert float((levels - levels.round()).abs().max()) < 1e-4
    assert float((levels - resized).abs().max()) < 0.5 + 1e-4  # half between two levels either is right
    big = published_networks.resize(images[0], (96, 128), (0.5, 0.5), cubic=False).floor()
    mosaic = fragments(frames[:1].permute(3, 0, 1, 2), sizes=SMALL, generator=torch.Generator().manual_seed(1))[:, 0]
    for row, column in itertools.product(range(3), repeat=2):  # cells are 32 x 42
        part = mosaic[:, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
        cell = big[:, 32 * row : 32 * row + 32, 42 * column : 42 * column + 42]
        wrong = [float((part - cell[:, :, left : left + 32]).abs().max()) for left in range(10)]
        assert min(wrong) <= 1  # a level may be cut on either side of a whole one
        assert sorted(wrong)[1] > 50


def test_without_weights_it_is_skipped_with_the_key() -> None:
    for name, title in (("vqa_a", "VQA-A (DOVER)"), ("vqa_t", "VQA-T (DOVER)")):
        metric = load_leaf("metric", name)
        assert metric.title == title
        assert metric.absent() == f"DOVER.pth is not there: no folder was named (+metric.{name}.weights=FOLDER)"
    assert (
        "it is published at https://github.com/VQAssessment/DOVER"
        in load_leaf("metric", "vqa_a", weights="none").absent()
    )
    with pytest.raises(ValueError, match="branch=overall is none of DOVER's"):
        DoverMetric(branch="overall", weights=None)
