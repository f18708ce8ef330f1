"""Products of codes by integers: the bits of the product in floating point, and only where they are exact."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from qvgen.layers import integer_product
from qvgen.layers.fused_product import unfused
from qvgen_kernels.cpu_library import missing_reason
from qvgen_kernels.fake_quantize import RowSpec, operators
from tests.layers.test_fused_product import assert_same, draw_gradient, draw_input, draw_layer, passes

INPUT = RowSpec(kind="dynamic", qmin=0, qmax=15, zero_point="integer", group=64)
WEIGHT = RowSpec(kind="learned", qmin=-8, qmax=7, zero_point="none", group=64)
EIGHT = replace(WEIGHT, qmin=-127, qmax=127)


@pytest.fixture
def integer_calls(monkeypatch):
    """Types of the products, which are computed with integers on every processor."""
    calls, computed = [], integer_product.product

    def product(left, right, *, dtype):
        calls.append(left.dtype)
        return computed(left, right, dtype=dtype)

    monkeypatch.setattr(integer_product, "product", product)
    monkeypatch.setattr(integer_product, "runs_here", lambda x, outputs: True)
    return calls


@pytest.mark.skipif(missing_reason() is not None, reason="no C++ compiler")
def test_random_layers_have_the_bits_of_the_product_in_floating_point(integer_calls):
    """Rows with NaN, infinities and zeros among them; layers with Phi and grids that are too wide are left alone."""
    for seed in range(40):
        draw = random.Random(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layer = draw_layer(draw)
            x = draw_input(draw, layer.in_features)
            gradient = draw_gradient(draw, (*x.shape[:-1], layer.out_features))
        autocast = draw.random() < 0.3
        with unfused():
            expected = passes(layer, x, gradient, autocast=autocast)
        found = passes(layer, x, gradient, autocast=autocast)
        assert_same(found, expected)
        if layer.phi is not None:
            assert integer_calls[-1] is not torch.int8
    assert integer_calls.count(torch.int8) >= 5
    assert integer_calls.count(torch.int8) < len(integer_calls)


@pytest.mark.parametrize(
    ("left", "right", "columns", "expected"),
    [
        (INPUT, WEIGHT, 8960, True),
        (EIGHT, EIGHT, 1040, True),
        (EIGHT, EIGHT, 1041, False),  # 127 * 127 * 1041 > 2^24
        (replace(INPUT, qmax=255), WEIGHT, 64, False),  # 255 - 0 is no int8
        (replace(INPUT, qmax=127), WEIGHT, 64, True),
        (INPUT, replace(WEIGHT, zero_point="real"), 64, False),
        (INPUT, replace(WEIGHT, zero_point="real", qmin=0, qmax=15, raw=True), 64, True),
        (replace(INPUT, factored=False), WEIGHT, 64, False),
    ],
)
def test_what_is_whole(left, right, columns, expected):
    assert integer_product.are_whole(left, right, columns=columns) is expected


def test_the_mode_is_followed():
    x = torch.zeros(32, 64)
    try:
        integer_product.set_int8_products("never")
        assert not integer_product.runs_here(x, 64)
        integer_product.set_int8_products("always")
        assert integer_product.runs_here(x, 64) == torch.cpu._is_vnni_supported()
        with pytest.raises(ValueError, match="int8 products 'often'; write auto, always, never"):
            integer_product.set_int8_products("often")
    finally:
        integer_product.set_int8_products("auto")


@pytest.mark.skipif(missing_reason() is not None, reason="no C++ compiler")
def test_a_row_with_a_nan_has_a_scale_that_is_nan():
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    x[1, 5] = torch.nan
    scale, zero = torch.full((3, 1), 0.1), torch.full((3, 1), 7.0)
    spec = replace(INPUT, kind="static").to_string()
    wide = operators(x).quantize_rows(x, [scale, zero], None, spec, torch.float32)
    narrow = operators(x).quantize_rows(x, [scale, zero], None, spec, torch.int8)
    assert narrow[0].dtype is torch.int8
    assert narrow[1][:, 0].isnan().tolist() == [False, True, False]
    assert torch.equal(narrow[1][::2], wide[1][::2])
    assert torch.equal(narrow[0].float(), wide[0].nan_to_num(0.0))
