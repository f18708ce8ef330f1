"""Triton's kernels under Triton's interpreter, in a process that may have imported Triton already."""

import os
import warnings

import numpy as np
import pytest

from qvgen_kernels import get_backend, packed_linear
from tests.kernels.triton_bounds import checked_accesses

pytest.importorskip("triton", minversion="3.6", reason="Triton 3.6 or newer is not installed here")


def _import_interpreted():
    """Import the kernels' modules as TRITON_INTERPRET=1 makes them; nothing else in the tests imports them."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        from qvgen_kernels.attention.triton import attend as attention_attend
        from qvgen_kernels.attention.triton import gradient as attention_gradient
        from qvgen_kernels.attention.triton import quantize as attention_quantize
        from qvgen_kernels.triton import fake_operators, function_choice, gemm, launch, quantize, rotate, steps
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    assert launch.INTERPRETED
    attention = (attention_attend, attention_gradient, attention_quantize)
    return *attention, fake_operators, function_choice, gemm, quantize, rotate, steps


(
    attention_attend,
    attention_gradient,
    attention_quantize,
    fake_operators,
    function_choice,
    gemm,
    quantize,
    rotate,
    steps,
) = _import_interpreted()


@pytest.fixture(autouse=True)
def _quiet_numpy():
    """Let numpy, which stands for the card, make infinities and NaNs without a word, as a card does; hold it to bounds."""
    with np.errstate(all="ignore"), warnings.catch_warnings(), checked_accesses():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
        yield


def prepacked(layer):
    return get_backend("triton").prepack(layer.planes, scale=layer.scale, zero_point=layer.zero_point, spec=layer.spec)


def run(case):
    """The outputs of a case, through the registered operator."""
    return packed_linear(
        case.x, weight=prepacked(case.layer), tensors=case.tensors, spec=case.layer.spec, kernel="triton"
    )


def quantized(case):
    """Operands q - z [M, K] and scales [M, Ga] that the kernel makes, and its sums of operands [M, G] or None."""
    from qvgen_kernels.triton.layout import layout_of

    spec, rows = case.layer.spec, len(case.x)
    found = quantize.quantize_rows(case.x, spec=spec, tensors=case.tensors)
    layout = layout_of(spec)
    used = layout.groups * layout.padded_group
    assert not found.codes[:, used:].any()
    groups = found.codes[:, :used].unflatten(1, (layout.groups, layout.padded_group))
    assert not groups[..., layout.group :].any()
    operand = groups[..., : layout.group].flatten(1).int()
    if found.shift is not None:
        shift = found.shift[:, :rows].t()
        operand = (operand.unflatten(1, (shift.shape[1], -1)) + shift[..., None]).flatten(1)
    return operand, found.scale[:, :rows].t(), None if found.row_sum is None else found.row_sum[:, :rows].t()
