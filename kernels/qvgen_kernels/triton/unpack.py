"""Operands from packed bytes in registers (layout.py has the order), as Triton functions.

On NVIDIA cards four bytes of a register are shifted and masked at once, by inline assembly: a shift of a byte tensor would
be widened, and narrowed by byte permutations. The interpreter and AMD cards take plain shifts.
"""

import triton
import triton.language as tl

__all__ = ["operand"]

_LEFT_AND: tl.constexpr = tl.constexpr("shl.b32 $0, $1, {}; and.b32 $0, $0, {};")


@triton.jit
def _field(packed, left: tl.constexpr, mask: tl.constexpr, plain: tl.constexpr):
    """(byte << left) & mask of every byte; a negative ``left`` shifts to the right."""
    if plain:
        wide = packed.to(tl.int32) & 255
        moved = wide << left if left >= 0 else wide >> -left
        return (moved & mask).to(tl.int8)
    word: tl.constexpr = mask * 0x01010101
    if left == 0:
        text: tl.constexpr = f"and.b32 $0, $1, {word};"
    elif left > 0:
        text: tl.constexpr = f"{{ .reg .b32 t; shl.b32 t, $1, {left}; and.b32 $0, t, {word}; }}"
    else:
        text: tl.constexpr = f"{{ .reg .b32 t; shr.b32 t, $1, {-left}; and.b32 $0, t, {word}; }}"
    return tl.inline_asm_elementwise(text, "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def operand(first, second, field: tl.constexpr, bits: tl.constexpr, plain: tl.constexpr):
    """Operand [N, C] of a field: the codes minus 2^(bits-1), times 16 (4 bits), 32 (3 bits) or 64 (2 bits).

    Args:
        first: int8 [N, C], the bytes; of 3 bits the low bits' ones that hold the field.
        second: Bytes of the top bits, for 3 bits.
        field: Number of the field.
        bits: Width of a code.
        plain: Without inline assembly.
    """
    if bits == 4:
        return _field(first, 4 - 4 * field, 0xF0, plain)
    if bits == 2:
        return _field(first, 6 - 2 * field, 0xC0, plain)
    if bits == 3:
        return _field(first, 5 - 2 * (field % 4), 0x60, plain) | _field(second, 7 - field, 0x80, plain)
    return first
