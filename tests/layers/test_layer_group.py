"""Groups, blocks and units against names written down by hand; windows against a schedule counted by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvgen.layers.layer_group import GROUPS, LayerUnit, block_of, group_of, layer_units
from qvgen.layers.noise_window import band_windows

LATTE = {
    "self_attention": ["transformer_blocks.*.attn1.*"],
    "cross_attention": ["transformer_blocks.*.attn2.*"],
    "temporal_attention": ["temporal_transformer_blocks.*.attn1.*"],
    "ffn": ["transformer_blocks.*.ff.*", "temporal_transformer_blocks.*.ff.*"],
}
"""A model with spatial and temporal blocks of their own (LatteTransformer3DModel)."""


def test_every_layer_is_in_one_unit_by_hand():
    names = [
        "temporal_transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_out.0",
        "transformer_blocks.0.attn2.to_k", "transformer_blocks.1.attn1.to_q", "transformer_blocks.0.ff.net.0.proj",
        "transformer_blocks.0.ff.net.2", "transformer_blocks.0.norm1.linear", "caption_projection.linear_1", "proj_out",
    ]  # fmt: skip
    units = layer_units(names, LATTE)
    assert [unit.name for unit in units] == [
        "cross_attention:transformer_blocks.0",
        "temporal_attention:temporal_transformer_blocks.0",
        "self_attention:transformer_blocks.0",
        "self_attention:transformer_blocks.1",
        "ffn:transformer_blocks.0",
        "other:transformer_blocks.0",
        "other:caption_projection",
        "other:proj_out",
    ]
    assert sorted(name for unit in units for name in unit.layers) == sorted(names)
    assert units[2].layers == ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_out.0")
    assert units[2].module == "transformer_blocks.0.attn1"
    assert units[0].module == "transformer_blocks.0.attn2"
    assert units[4].module == "transformer_blocks.0.ff.net"


def test_a_temporal_pattern_does_not_catch_the_spatial_blocks():
    assert group_of("transformer_blocks.3.attn1.to_q", LATTE) == "self_attention"
    assert group_of("temporal_transformer_blocks.3.attn1.to_q", LATTE) == "temporal_attention"


def test_blocks():
    assert block_of("blocks.12.ffn.net.0.proj") == "blocks.12"
    assert block_of("condition_embedder.time_embedder.linear_1") == "condition_embedder"
    assert block_of("layers.0") == "layers"  # the number is the layer's own
    unit = LayerUnit(group="other", block="proj_out", layers=("proj_out",))
    assert unit.module == ""


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match="a.b is in the groups self_attention and ffn"):
        layer_units(["a.b"], {"self_attention": ["a.*"], "ffn": ["*.b"]})
    with pytest.raises(ValueError, match="layer_groups holds 'mlp'"):
        layer_units(["a.b"], {"mlp": ["*"]})
    with pytest.raises(ValueError, match="'other'"):
        layer_units(["a.b"], {"other": ["*"]})


def test_windows_of_a_shifted_schedule():
    """Shift 3, 8 steps: five of them in the upper fifth of the timesteps; two to a window all the same."""
    timesteps = [1000 * 3 * s / (1 + 2 * s) for s in (index / 8 for index in range(8, 0, -1))]
    bands = [min(int(t * 50 / 1000), 49) for t in timesteps]
    windows = band_windows(bands, num_windows=4, num_bands=50)
    assert [windows[band] for band in bands] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert windows[0] == 3
    assert windows[49] == 0
    assert len(windows) == 50


@given(st.sets(st.integers(0, 49), min_size=4), st.integers(1, 4))
def test_windows_fall_with_the_noise_and_share_the_steps(visited, count):
    windows = band_windows(sorted(visited), num_windows=count, num_bands=50)
    assert list(windows) == sorted(windows, reverse=True)
    sizes = [sum(windows[band] == window for band in visited) for window in range(count)]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="3 sampling steps visit 2 noise bands, too few for 4 windows"):
        band_windows([5, 5, 9], num_windows=4, num_bands=10)


def test_the_groups_are_those_of_the_paper_and_a_rest():
    assert GROUPS == ("cross_attention", "temporal_attention", "self_attention", "ffn", "other")
