"""Errors of candidate ranges on every backend that runs here, against NumPy in float64."""

import numpy as np
import pytest
import torch

from qvgen_kernels import range_search
from qvgen_kernels.cpu_library import missing_reason, supported
from qvgen_kernels.range_search import ACCURACY, range_errors, refusal

pytestmark = pytest.mark.skipif(missing_reason() is not None, reason="no C++ compiler")


def candidates(rows, *, count, zero):
    scale = torch.logspace(-1, 0, count).expand(len(rows), count) * (rows.amax(1) - rows.amin(1))[:, None] / 7
    return scale.contiguous(), torch.full_like(scale, zero)


@pytest.mark.parametrize("variant", range_search._VARIANTS)
@pytest.mark.parametrize(("columns", "zero"), [(1, 3.0), (17, 3.0), (100, 2.71), (1920, 4.4), (1033, 4.0)])
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e9])
def test_a_sum_is_right_to_the_stated_accuracy(variant, columns, zero, size, monkeypatch):
    if supported(variant) is not None:
        pytest.skip(supported(variant))
    monkeypatch.setattr(range_search, "_VARIANTS", (variant,))
    rows = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns)) * size + 0.1 * size
    scale, zeros = candidates(torch.cat((rows, -rows), 1), count=11, zero=zero)
    real = zero != round(zero)
    found = range_errors(rows, divisor=scale, scale=scale, zero=zeros, codes=(0, 7), real=real, margin=float("inf"))
    x, s, z = (value.double().numpy() for value in (rows[:, None], scale[..., None], zeros[..., None]))
    inverse = scale.reciprocal().double().numpy()[..., None]
    codes = np.clip(np.round(x * inverse + z) if real else np.round(x * inverse) + z, 0, 7)
    expected = (np.abs((codes - z) * s - x) ** 2.4).sum(-1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=ACCURACY)


def test_a_sum_that_is_given_up_is_above_the_limit_and_no_other_changes():
    rows = torch.randn(4, 4000, generator=torch.Generator().manual_seed(0))
    scale, zeros = candidates(rows, count=40, zero=3.0)
    options = {"divisor": scale, "scale": scale, "zero": zeros, "codes": (0, 7), "real": False}
    whole, cut = (range_errors(rows, **options, margin=margin) for margin in (float("inf"), 1.01))
    given_up = cut != whole
    assert given_up.float().mean() > 0.5
    assert (cut[given_up] > 1.01 * whole.amin(1, keepdim=True).expand_as(whole)[given_up]).all()
    assert (cut[given_up] < whole[given_up]).all()
    assert torch.equal(cut.amin(1), whole.amin(1))


def test_what_it_does_not_take_is_refused():
    assert refusal(torch.zeros(2, 3)) is None
    assert "float64" in refusal(torch.zeros(2, 3).double())
    assert "meta" in refusal(torch.zeros(2, 3, device="meta"))
    assert refusal(torch.zeros(0, 3)) is not None
