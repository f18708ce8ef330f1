"""The published sizes of every model, on the meta device, against an independent count, and what the patterns select.

The table is the one of docs/models.md: parameters in 10^9 and Linears, counted from the published configurations.
"""

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from torch import nn

from qvgen.config.leaves import load_leaf
from qvgen.layers.swap import select_linears

# name: parameters (10^9), Linears, Linears of attention and feed-forward and their weights (10^9), adaLN Linears and weights
SIZES = {
    "cogvideox": (1.694, 245, 180, 1.327, 61, 0.356),
    "cogvideox-5b": (5.570, 341, 252, 4.756, 85, 0.796),
    "cogvideox1.5": (5.571, 342, 252, 4.756, 85, 0.796),
    "wan": (1.419, 306, 300, 1.392, 0, 0.0),
    "wan-14b": (14.289, 406, 400, 14.051, 0, 0.0),
    "wan2.2-a14b": (14.289, 406, 400, 14.051, 0, 0.0),
    "wan2.2-ti2v": (5.000, 306, 300, 4.907, 0, 0.0),
    "wan2.2-i2v-5b": (5.000, 306, 300, 4.907, 0, 0.0),
    "wan-i2v-14b": (16.395, 488, 480, 16.148, 0, 0.0),
    "wan2.2-i2v-a14b": (14.289, 406, 400, 14.051, 0, 0.0),
    "cogvideox-i2v": (5.570, 341, 252, 4.756, 85, 0.796),
    "cogvideox1.5-i2v": (5.572, 344, 252, 4.756, 85, 0.796),
    "ltx": (1.923, 287, 280, 1.879, 0, 0.0),
    "ltx-13b": (13.043, 487, 480, 12.885, 0, 0.0),
    "latte": (1.057, 454, 448, 1.040, 0, 0.0),
    "opensora": (1.208, 400, 392, 1.189, 0, 0.0),
    "hunyuanvideo": (12.821, 547, 440, 9.060, 81, 3.416),
    "hunyuanvideo1.5": (8.327, 784, 648, 5.436, 109, 2.726),
    "hunyuanvideo1.5-i2v": (8.327, 784, 648, 5.436, 109, 2.726),
    "mochi": (10.028, 677, 573, 7.224, 97, 2.723),
}
_CAPTION = ("caption_projection.linear_1", "caption_projection.linear_2")
_TIME = ("linear", "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2")
ENDS = {
    "CogVideoXTransformer3DModel": (
        "patch_embed.text_proj", "time_embedding.linear_1", "time_embedding.linear_2", "proj_out",
    ),
    "WanTransformer3DModel": (
        "condition_embedder.time_embedder.linear_1", "condition_embedder.time_embedder.linear_2",
        "condition_embedder.time_proj", "condition_embedder.text_embedder.linear_1",
        "condition_embedder.text_embedder.linear_2", "proj_out",
    ),
    "LTXVideoTransformer3DModel": (*_CAPTION, *(f"time_embed.{name}" for name in _TIME), "proj_in", "proj_out"),
    "LatteTransformer3DModel": (*_CAPTION, *(f"adaln_single.{name}" for name in _TIME), "proj_out"),
}  # fmt: skip
"""The Linears around the blocks of each class."""
BLOCK_PATTERNS = (
    "*transformer_blocks.*.attn?.*", "*transformer_blocks.*.ff.*", "blocks.*.attn?.*", "blocks.*.ffn.*",
    "transformer_blocks.*.attn.*", "transformer_blocks.*.ff_context.*", "single_transformer_blocks.*.attn.*",
    "single_transformer_blocks.*.proj_*", "spatial_blocks.*", "temporal_blocks.*",
)  # fmt: skip
ADALN_PATTERNS = (
    "transformer_blocks.*.norm?.linear", "norm_out.linear", "transformer_blocks.*.norm1_context.linear*",
    "single_transformer_blocks.*.norm.linear",
)  # fmt: skip
ONLY_BLOCKS = {
    "hunyuanvideo": (520, 12.457), "hunyuanvideo1.5": (756, 8.154), "hunyuanvideo1.5-i2v": (756, 8.154),
    "mochi": (669, 9.928), "opensora": (392, 1.189),
}  # fmt: skip
"""Families that leave embedders and the last projection alone: Linears that are quantized and their weights (10^9)."""


_EMBEDDER = "condition_embedder.image_embedder.ff.net"
SKIPPED = {
    "wan-i2v-14b": {f"{_EMBEDDER}.0.proj", f"{_EMBEDDER}.2"},
    "cogvideox1.5-i2v": {"ofs_embedding.linear_1", "ofs_embedding.linear_2"},
}
"""Linears around the blocks that stay as they are."""


def linears(model: nn.Module, patterns: tuple[str, ...]) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(fnmatchcase(name, pattern) for pattern in patterns)
    }


@pytest.fixture(scope="module", params=SIZES)
def full_size(request: pytest.FixtureRequest):
    family = load_leaf("model", request.param)
    with torch.device("meta"):
        return family, family.build(family.transformer_config)


def test_parameters_and_linears(full_size) -> None:
    family, model = full_size
    parameters, count, *blocks_and_adaln = SIZES[family.name]
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(parameters, abs=0.0006)
    assert len(linears(model, ("*",))) == count
    found = []
    for patterns in (BLOCK_PATTERNS, ADALN_PATTERNS):
        chosen = linears(model, patterns)
        found += [len(chosen), sum(layer.weight.numel() for layer in chosen.values()) / 1e9]
    assert found == pytest.approx(blocks_and_adaln, abs=0.0006)


def test_default_patterns_select_every_linear_and_nothing_else(full_size) -> None:
    """QVGen's released code quantizes every Linear; the patch embedding is one in CogVideoX1.5 alone."""
    family, model = full_size
    report = select_linears(model, include=family.include, exclude=family.exclude)
    if family.name in ONLY_BLOCKS:
        chosen = linears(model, BLOCK_PATTERNS + ADALN_PATTERNS)
        assert set(report.quantized) == set(chosen) - {"norm_out.linear"}
        weights = sum(chosen[name].weight.numel() for name in report.quantized) / 1e9
        assert (len(report.quantized), weights) == pytest.approx(ONLY_BLOCKS[family.name], abs=0.0006)
        return
    skipped = SKIPPED.get(family.name, set())
    assert len(report.quantized) == SIZES[family.name][1] - len(skipped)
    assert set(report.skipped) == skipped
    ends = set(ENDS[family.transformer_class])
    ends |= {"patch_embed.proj"} if family.name.startswith("cogvideox1.5") else set()
    blocks = linears(model, BLOCK_PATTERNS + ADALN_PATTERNS)
    assert set(report.quantized) == ends | set(blocks)


@pytest.mark.parametrize(
    ("name", "shape"),
    {
        "cogvideox": (16, 13, 60, 90),
        "cogvideox-5b": (16, 13, 60, 90),
        "cogvideox1.5": (16, 22, 96, 170),  # 21 latent frames, and one so that patches of 2 divide them
        "wan": (16, 13, 60, 104),
        "wan-14b": (16, 13, 60, 104),
        "wan2.2-a14b": (16, 13, 60, 104),
        "wan2.2-ti2v": (48, 13, 44, 80),
        "wan2.2-i2v-5b": (48, 12, 44, 80),  # the first of 13 latent frames is the image
        "wan-i2v-14b": (16, 13, 60, 104),
        "wan2.2-i2v-a14b": (16, 13, 60, 104),
        "cogvideox-i2v": (16, 13, 60, 90),
        "cogvideox1.5-i2v": (16, 22, 96, 170),
        "ltx": (128, 16, 16, 22),
        "ltx-13b": (128, 16, 16, 24),
        "latte": (4, 16, 64, 64),
        "hunyuanvideo": (16, 13, 68, 120),
        "hunyuanvideo1.5": (32, 13, 30, 53),
        "hunyuanvideo1.5-i2v": (32, 13, 30, 53),
        "mochi": (12, 9, 60, 106),
    }.items(),
)
def test_plan_without_weights(name: str, shape: tuple[int, ...]) -> None:
    family = load_leaf("model", name)
    assert family.name == name
    assert family.sample_shape == shape
    assert family.objective.sample_sigma(generator=torch.Generator().manual_seed(0)) < 1
    for call in (family.load_teacher, lambda: family.encode(["a cat"]), lambda: family.revision):
        with pytest.raises(
            ValueError,
            match=rf"model={name} needs its weights: download .* `hf download {family.repository} --local-dir FOLDER` "
            rf"and write model={name} model.path=FOLDER",
        ):
            call()


def test_objectives_are_those_of_the_published_schedulers() -> None:
    shifts = {
        name: load_leaf("model", name, shift=None).objective.shift
        for name in ("wan", "wan-14b", "wan2.2-a14b", "wan2.2-ti2v", "wan2.2-i2v-5b")
    }
    assert shifts == {"wan": 3.0, "wan-14b": 3.0, "wan2.2-a14b": 3.0, "wan2.2-ti2v": 5.0, "wan2.2-i2v-5b": 5.0}
    for name, scale in {"cogvideox": 3.0, "cogvideox-5b": 1.0, "cogvideox1.5": 1.0}.items():
        objective = load_leaf("model", name).objective
        assert (objective.snr_shift_scale, objective.zero_terminal_snr) == (scale, True)


def test_the_documented_table_is_this_one() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    for name, (parameters, count, blocks, *_) in SIZES.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` "))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        numbers = re.findall(r"\d+\.?\d*", " ".join(cells[2:]))
        assert {f"{parameters:.3f}", str(count), str(blocks)} <= set(numbers), row
