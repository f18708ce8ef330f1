"""Single float32 operations of the contract, as Triton functions."""

import triton
import triton.language as tl

__all__ = ["exponential", "from_key", "order_key", "round_to_integer", "round_to_type", "to_type"]

MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2^23: a float32 sum with it has no fraction, so adding and subtracting it rounds to nearest, halves to even."""


@triton.jit
def round_to_integer(v):
    """The whole number nearest to v, halves to even, float32; |v| <= 2^22."""
    return (v + MAGIC) - MAGIC


@triton.jit
def order_key(v):
    """int32 that is ordered as the float32 numbers are; a NaN lies beyond the infinity of its sign."""
    bits = v.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_key(key):
    """Inverse of order_key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def to_type(v, dtype: tl.constexpr, interpreted: tl.constexpr):
    """Convert float32 to a floating type, nearest even; by hand where Triton's interpreter would cut bfloat16 off."""
    if interpreted and dtype == tl.bfloat16:
        bits = v.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(v == v, rounded, 0x7FC0)
        return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return v.to(dtype)


@triton.jit
def round_to_type(v, dtype: tl.constexpr, interpreted: tl.constexpr):
    """float32 as after a conversion to a floating type and back."""
    if dtype == tl.float32:
        return v
    return to_type(v, dtype, interpreted).to(tl.float32)


@triton.jit
def exponential(v):
    """e^v as the CPU backends compute it (csrc/cpu/epilogue.inl), operation by operation, so that they agree to the bit."""
    v = tl.where(v > -87.0, v, -87.0)
    v = tl.where(v < 89.0, v, 89.0)
    n = round_to_integer(v * 1.44269504)
    r = (v - n * 0.693359375) + n * 2.12194440e-4
    e = r * 1.38888889e-3 + 8.33333333e-3
    e = e * r + 4.16666667e-2
    e = e * r + 1.66666667e-1
    e = e * r + 0.5
    e = e * r + 1.0
    e = e * r + 1.0
    return e * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
