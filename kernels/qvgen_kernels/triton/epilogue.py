"""From int32 sums to outputs (kernels/README.md, steps 4 and 5), as Triton functions on a tile [outputs, rows]."""

import triton
import triton.language as tl

from qvgen_kernels.triton.rounding import exponential, round_to_type, to_type

__all__ = ["add_group", "finish"]


@triton.jit
def add_group(y, acc, group, place, operands, sizes, form: tl.constexpr):
    """Add to the outputs, float32, what the sums of one group give.

    ``place`` is (outputs, rows) of the tile, ``operands`` (rows, weight). Outputs beyond the end read the last one's scale;
    vectors of rows are long enough for every tile.
    """
    a, w = operands
    n = tl.minimum(place[0], sizes.outputs - 1)
    m = place[1]
    of_n = group * sizes.outputs + n if form.weight_scales else n
    of_m = group * sizes.row_stride + m if form.input_scales else m
    acc = acc >> form.shift
    if a.row_sum is not None:
        row_sum = tl.load(a.row_sum + group * sizes.row_stride + m)
        if form.weight_zero == "integer":
            acc += tl.load(w.correction + of_n)[:, None] * row_sum[None, :]
        else:
            acc += form.middle * row_sum[None, :]
    if a.shift is not None:
        acc += tl.load(w.column_sum + group * sizes.outputs + n)[:, None] * tl.load(a.shift + of_m)[None, :]
    t = acc.to(tl.float32)
    if form.weight_zero == "real":
        t = t - tl.load(w.zero_point + of_n)[:, None] * row_sum.to(tl.float32)[None, :]
    return y + (t * tl.load(a.scale + of_m)[None, :]) * tl.load(w.scale + of_n)[:, None]


@triton.jit
def _function(y, form: tl.constexpr):
    """X / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3): GELU by tanh; or with u = x / 2: SiLU.

    The division is the card's fast one, within two units of float32's last place; IEEE division costs a call per output.
    """
    if form.function == "gelu_tanh":
        u = y * (1.0 + (0.044715 * y) * y)
        return y / (1.0 + exponential(-1.59576912 * u))
    return y / (1.0 + exponential(-y))


@triton.jit
def finish(y, place, tail, sizes, form: tl.constexpr):
    """Branch, bias, function, gate, residual, one cast, and the store; every rounding is that of a separate operator."""
    n, m = place[0], place[1].to(tl.int64)
    kind: tl.constexpr = tail.y.dtype.element_ty
    live = (n < sizes.outputs)[:, None] & (place[1] < sizes.rows)[None, :]
    if tail.branch is not None:
        y += tl.load(tail.branch + m[None, :] * sizes.outputs + n[:, None], mask=live, other=0.0).to(tl.float32)
    if tail.bias is not None:
        y += tl.load(tail.bias + n, mask=n < sizes.outputs, other=0.0)[:, None]
    if form.function != "none":
        y = _function(round_to_type(y, kind, form.interpreted), form)
    if (tail.gate is not None) or (tail.residual is not None):
        y = round_to_type(y, kind, form.interpreted)
    if tail.gate is not None:
        sample = (place[1] // sizes.gate_rows).to(tl.int64)
        gate = tail.gate + sample[None, :] * sizes.gate_row + n[:, None] * sizes.gate_column
        y = y * tl.load(gate, mask=live, other=0.0).to(tl.float32)
        if tail.gate.dtype.element_ty == kind:
            y = round_to_type(y, kind, form.interpreted)
    if tail.residual is not None:
        residual = tail.residual + m[None, :] * sizes.residual_row + n[:, None] * sizes.residual_column
        y = tl.load(residual, mask=live, other=0.0).to(tl.float32) + y
    target = tail.y + m[None, :] * sizes.outputs + n[:, None]
    tl.store(target, to_type(y, kind, form.interpreted), mask=live)
