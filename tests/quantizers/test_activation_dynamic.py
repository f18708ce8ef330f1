"""Learned clips: their tables, start, and gradients through the sigmoid."""

import math

import pytest
import torch

from qvgen.quant.grid import Grid
from qvgen.quantizers.activation_dynamic import ActivationDynamic


def make_quantizer(kind="integer", num_bands=5, bits=4):
    grid = Grid(bits=bits, granularity="per_token", zero_point=kind)
    return ActivationDynamic(grid=grid, num_bands=num_bands, start=0.75)


def test_clips_start_where_they_are_told_in_every_band():
    quantizer = make_quantizer()
    for table in quantizer.tables():
        assert table.shape == (5,)
        assert table.dtype == torch.float32
        torch.testing.assert_close(table, torch.full((5,), 0.75), rtol=2.0**-21, atol=0)  # a float32 logit and sigmoid
    quantizer.start_from_(0.5, 0.999)
    for table, share in zip(quantizer.tables(), (0.5, 0.999), strict=True):
        torch.testing.assert_close(table, torch.full((5,), share), rtol=2.0**-21, atol=0)
    symmetric = make_quantizer("none")
    symmetric.start_from_(0.5, 0.9)
    assert symmetric.tables()[0] is None
    torch.testing.assert_close(symmetric.tables()[1], torch.full((5,), 0.9), rtol=2.0**-21, atol=0)


def test_tables_are_sigmoids_of_the_parameters():
    quantizer = make_quantizer()
    with torch.no_grad():
        quantizer.clip_low.copy_(torch.tensor([-1.0, 0.0, 1.0, 2.0, 20.0]))
        quantizer.clip_high.copy_(torch.tensor([3.0, 0.0, -2.0, 5.0, -40.0]))
    low, high = quantizer.tables()
    for table, logits in ((low, quantizer.clip_low), (high, quantizer.clip_high)):
        expected = [1 / (1 + math.exp(-value)) for value in logits.tolist()]
        assert table.tolist() == pytest.approx(expected, rel=1e-6)  # float32
        assert ((table >= 0) & (table <= 1)).all()
    (low.sum() + 2 * high.sum()).backward()
    # The slope s (1 - s) loses digits to cancellation next to 1: absolute float32 precision.
    assert quantizer.clip_low.grad.tolist() == pytest.approx((low * (1 - low)).tolist(), abs=1e-7)
    assert quantizer.clip_high.grad.tolist() == pytest.approx((2 * high * (1 - high)).tolist(), abs=1e-7)


def test_a_symmetric_grid_has_one_clip():
    quantizer = make_quantizer("none")
    assert quantizer.clip_low is None
    assert [name for name, _ in quantizer.named_parameters()] == ["clip_high"]
    low, high = quantizer.tables()
    assert low is None
    assert high.shape == (5,)


def test_a_grid_without_clips_has_none_and_trains_nothing():
    grid = Grid(bits=4, granularity="per_token", zero_point="none", clip=False)
    quantizer = ActivationDynamic(grid=grid, num_bands=5, start=0.9)
    quantizer.start_from_(0.5, 0.5)  # there is nothing to start
    assert quantizer.tables() == (None, None)
    assert list(quantizer.parameters()) == []
    assert "no clips" in repr(quantizer)


def test_the_gradient_of_one_band_stays_there():
    quantizer = make_quantizer()
    low, high = quantizer.tables()
    (low[2] * high[4]).backward()
    assert quantizer.clip_low.grad.nonzero().tolist() == [[2]]
    assert quantizer.clip_high.grad.nonzero().tolist() == [[4]]


def test_state_comes_back_bitwise():
    quantizer = make_quantizer()
    with torch.no_grad():
        quantizer.clip_low.normal_(generator=torch.Generator().manual_seed(0))
    other = make_quantizer()
    other.load_state_dict(quantizer.state_dict(), strict=True)
    for got, expected in zip(other.tables(), quantizer.tables(), strict=True):
        assert torch.equal(got, expected)
    assert "4 bits, per_token, bands=5" in repr(quantizer)
    with pytest.raises(RuntimeError, match="clip_low"):
        make_quantizer(num_bands=6).load_state_dict(quantizer.state_dict())
