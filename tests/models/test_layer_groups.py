"""Every family's groups on its real transformer (meta device): a partition, and counts that follow from docs/models.md."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from qvgen.config.leaves import conf_directory, load_leaf
from qvgen.layers.layer_group import layer_units
from qvgen.layers.swap import select_linears

NAMES = sorted(
    {path.stem for path in (conf_directory() / "model").glob("*.yaml")} - {"diffusers"}
)  # it has a folder's layers
WANTED = {
    "tiny": {"self_attention": 12, "cross_attention": 12, "ffn": 6, "other": 6},
    "tiny_fewstep": {"self_attention": 12, "cross_attention": 12, "ffn": 6, "other": 6},
    "tiny_wide": {"self_attention": 16, "cross_attention": 16, "ffn": 8, "other": 6},
    "small": {"self_attention": 24, "cross_attention": 24, "ffn": 12, "other": 6},
    "wan": {"self_attention": 120, "cross_attention": 120, "ffn": 60, "other": 6},
    "wan-14b": {"self_attention": 160, "cross_attention": 160, "ffn": 80, "other": 6},
    "wan2.2-a14b": {"self_attention": 160, "cross_attention": 160, "ffn": 80, "other": 6},
    "wan2.2-ti2v": {"self_attention": 120, "cross_attention": 120, "ffn": 60, "other": 6},
    "wan2.2-i2v-5b": {"self_attention": 120, "cross_attention": 120, "ffn": 60, "other": 6},
    "wan-i2v-14b": {"self_attention": 160, "cross_attention": 240, "ffn": 80, "other": 6},
    "wan2.2-i2v-a14b": {"self_attention": 160, "cross_attention": 160, "ffn": 80, "other": 6},
    "ltx": {"self_attention": 112, "cross_attention": 112, "ffn": 56, "other": 7},
    "ltx-13b": {"self_attention": 192, "cross_attention": 192, "ffn": 96, "other": 7},
    "latte": {"self_attention": 112, "cross_attention": 112, "temporal_attention": 112, "ffn": 112, "other": 6},
    "opensora": {"self_attention": 56, "cross_attention": 168, "temporal_attention": 56, "ffn": 112},
    "cogvideox": {"self_attention": 120, "ffn": 60, "other": 65},
    "cogvideox-5b": {"self_attention": 168, "ffn": 84, "other": 89},
    "cogvideox1.5": {"self_attention": 168, "ffn": 84, "other": 90},
    "cogvideox-i2v": {"self_attention": 168, "ffn": 84, "other": 89},
    "cogvideox1.5-i2v": {"self_attention": 168, "ffn": 84, "other": 90},
    "hunyuanvideo": {"self_attention": 280, "ffn": 160, "other": 80},
    "hunyuanvideo1.5": {"self_attention": 432, "ffn": 216, "other": 108},
    "hunyuanvideo1.5-i2v": {"self_attention": 432, "ffn": 216, "other": 108},
    "mochi": {"self_attention": 383, "ffn": 190, "other": 96},
}
"""Attention has four Linears, a feed-forward net two; the rest are embedders, adaLN (CogVideoX: two a block), the output.

With a stream of its own for the text both are twice as many; blocks of one stream have theirs without a Linear behind it."""
ATTENTION = {
    "hunyuanvideo": {8, 3},
    "hunyuanvideo1.5": {8},
    "hunyuanvideo1.5-i2v": {8},
    "mochi": {8, 7},
    "opensora": {2, 3},
    "wan-i2v-14b": {4, 6},
}
"""Linears of an attention where they are not four; the last of Mochi makes nothing for the text, Wan's reads an image too.

Those of Open-Sora make queries, keys and values, or keys and values, in one."""


@pytest.mark.parametrize("model", NAMES)
def test_every_quantized_layer_is_in_exactly_one_group(model):
    family = load_leaf("model", model)
    with torch.device("meta"):
        transformer = family.build(family.transformer_config)
    names = select_linears(transformer, include=family.include, exclude=family.exclude).quantized
    units = layer_units(names, family.layer_groups)
    assert sorted(name for unit in units for name in unit.layers) == sorted(names)
    assert len({unit.name for unit in units}) == len(units)
    counts = Counter(unit.group for unit in units for _ in unit.layers)
    assert dict(counts) == WANTED[model]
    for unit in units:
        assert unit.group == "other" or transformer.get_submodule(unit.module) is not None
        if unit.group.endswith("_attention"):
            assert len(unit.layers) in ATTENTION.get(model, {4})
            assert unit.module.rpartition(".")[2] in ("attn", "attn1", "attn2", "cross_attn")
