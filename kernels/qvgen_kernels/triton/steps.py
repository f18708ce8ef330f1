"""The steps before a quantizer (kernels/README.md, "Input steps"), as Triton functions on a tile [rows, columns] of float32.

A norm's sums are of whole numbers, so they may be made in any order. A function is one of several variants: which of them
gives torch's bits on a device is found out there (function_choice.py).
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from qvgen_kernels.triton.rounding import MAGIC, exponential, round_to_type

__all__ = ["VARIANTS", "function_kernel", "prepare"]

VARIANTS = {
    "gelu_tanh": ("gelu_tanh, contracted", "gelu_tanh, separate", "gelu_tanh, exponential"),
    "silu": ("silu, precise", "silu, exponential"),
}
"""By function, in the order in which they are tried; the first ones are what torch's CUDA sources say."""

_INFINITY = tl.constexpr(0x7F800000)
_MAGIC_BITS = tl.constexpr(0x4B400000)
_BETA = tl.constexpr(0.7978845608028654)


@triton.jit
def _rounded(v, kind: tl.constexpr, interpreted: tl.constexpr):
    if kind == "bfloat16":
        return round_to_type(v, tl.bfloat16, interpreted)
    if kind == "float16":
        return round_to_type(v, tl.float16, interpreted)
    return v


@triton.jit
def _tanh(u, interpreted: tl.constexpr):
    if interpreted:
        return 1.0 - tl.div_rn(tl.full(u.shape, 2.0, tl.float32), 1.0 + exponential(2.0 * u))
    return libdevice.tanh(u)


@triton.jit
def _function(x, variant: tl.constexpr, interpreted: tl.constexpr):
    """F(x), float32."""
    if variant == "gelu_tanh, contracted":
        inner = tl.fma((x * x) * x, tl.full(x.shape, 0.044715, tl.float32), x)
        return (0.5 * x) * (1.0 + _tanh(inner * _BETA, interpreted))
    if variant == "gelu_tanh, separate":
        inner = x + ((x * x) * x) * 0.044715
        return (0.5 * x) * (1.0 + _tanh(inner * _BETA, interpreted))
    if variant == "gelu_tanh, exponential":
        u = x * (1.0 + (0.044715 * x) * x)
        return tl.div_rn(x, 1.0 + exponential(-1.59576912 * u))
    if variant == "silu, exponential" or interpreted:
        return tl.div_rn(x, 1.0 + exponential(-x))
    return tl.div_rn(x, 1.0 + libdevice.exp(-x))


@triton.jit
def function_kernel(x, y, numbers: tl.constexpr, variant: tl.constexpr, interpreted: tl.constexpr):
    """Y = T(f(x)) of ``numbers`` numbers of T in each program."""
    place = tl.program_id(0) * numbers + tl.arange(0, numbers)
    kind: tl.constexpr = y.dtype.element_ty
    v = _function(tl.load(x + place).to(tl.float32), variant, interpreted)
    tl.store(y + place, round_to_type(v, kind, interpreted))


@triton.jit
def _powers(v):
    """2^(21 - k), its inverse, and whether all is finite, of rows whose largest magnitude lies in [2^k, 2^(k+1))."""
    bits = tl.reduce(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1, tl.standard._elementwise_max)
    exponent = tl.minimum(tl.maximum(bits >> 23, 27), 254)
    up, down = (275 - exponent) << 23, (exponent - 21) << 23
    return up.to(tl.float32, bitcast=True), down.to(tl.float32, bitcast=True), bits < _INFINITY


@triton.jit
def _whole(v):
    """The nearest whole numbers, int64; |v| <= 2^22."""
    return ((v + MAGIC).to(tl.int32, bitcast=True) - _MAGIC_BITS).to(tl.int64)


@triton.jit
def _mean_of(total, columns, down):
    """A sum in whole numbers as a mean of what was summed, before its scaling by ``down``."""
    mean = total.to(tl.float32)
    return tl.div_rn(mean, tl.full(mean.shape, columns, tl.float32)) * down


@triton.jit
def _normed(v, t, column, mask, form: tl.constexpr):
    """LayerNorm or RMSNorm of whole rows, 0 where masked."""
    if form.norm == "layer":
        up, down, finite = _powers(v)
        total = tl.reduce(_whole(v * up[:, None]), 1, tl.standard._sum_combine)
        mean = tl.where(finite, _mean_of(total, form.segment, down), float("nan"))
        v = tl.where(mask, v - mean[:, None], 0.0)
    up, down, finite = _powers(v)
    whole = _whole(v * up[:, None])
    variance = _mean_of(tl.reduce(whole * whole, 1, tl.standard._sum_combine), form.segment, down) * down
    rstd = tl.div_rn(tl.full(variance.shape, 1.0, tl.float32), tl.sqrt_rn(variance + form.eps))
    v = v * tl.where(finite, rstd, float("nan"))[:, None]
    if t.norm_weight is not None:
        v = v * tl.load(t.norm_weight + column, mask=mask, other=0.0).to(tl.float32)
    if t.norm_bias is not None:
        v = v + tl.load(t.norm_bias + column, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, v, 0.0)


@triton.jit
def prepare(v, t, sizes, place, live, mask, form: tl.constexpr):
    """Take a tile of x through the steps; ``place`` is (rows, columns), columns counted from the rows' beginnings."""
    row, column = place[0], place[1]
    if form.norm != "none":
        v = _rounded(_normed(v, t, column, mask, form), form.round_to, form.interpreted)
    if t.gain is not None:
        if t.gain_of_row is not None:
            # Kept within bounds: no value is looked at to refuse one that is not.
            own = tl.load(t.gain_of_row + row, mask=live, other=0)
            own = tl.minimum(tl.maximum(own, 0), sizes.gain_count - 1).to(tl.int64)
        else:
            own = row // sizes.gain_rows
        gain = tl.load(t.gain + own[:, None] * sizes.gain_row + column, mask=mask, other=0.0).to(tl.float32)
        shift = tl.load(t.shift_by + own[:, None] * sizes.shift_row + column, mask=mask, other=0.0).to(tl.float32)
        v = _rounded(v * gain, form.round_to, form.interpreted)
        v = _rounded(v + shift, form.round_to, form.interpreted)
    v = _rounded(v, form.dtype, form.interpreted)
    if form.function != "none":
        v = _rounded(_function(v, form.function, form.interpreted), form.dtype, form.interpreted)
    return v
