"""Constants, pointers and sizes of the attention's Triton kernels, and how codes lie in memory.

    query   int8 [heads, M, width]                     factor float32 [heads, M]
    key     int8 [heads, blocks * 64, width]           scale float32 [heads, blocks * 64]
    value   int8 [heads, blocks, width, 64]            base  int32 [heads, blocks, width]

with heads = B H, blocks = ceil(N / 64), and width the power of two from 32 on that holds D. Columns from D on and tokens
from N on have the code 0. Tensor cores take bytes whose inner index is contiguous, so a block of values lies transposed.

*Order of tokens in a block of values.* A thread of a tensor core holds the sums of two neighbouring keys in every eight, and
as an operand four neighbouring bytes in every sixteen. So values of a token with the bits 0bFEDCBA of its number in the block
lie at 0bFECBDA: there a thread's own probabilities are the operand that it needs, and no byte moves between threads.

*Signed probabilities.* Triton multiplies signed bytes alone, and probabilities are 0 .. 255. With p' = p - 128, which fits,

    sum p_j v_jd = sum p'_j v_jd + 128 sum v_jd            over all 64 keys of the block, in int32

which is exact: hidden keys have p' = -128 and their own part in the second sum takes that back; keys from N on have v = 0.
``base`` is the second sum plus the bits of 1.5 * 2^23, and the product starts from it, so that its result is the bits of
the float32 number 1.5 * 2^23 + a: |a| <= 255 * 127 * 64 < 2^21 leaves it within one binade.

*Plain values* (``int8_qk``) lie where the caller has them: there are no codes of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from qvgen_kernels.attention.contract import BLOCK

__all__ = [
    "AttendForm",
    "AttendSizes",
    "AttendTensors",
    "Codes",
    "Statistics",
    "TokenForm",
    "TokenSizes",
    "TokenTensors",
    "attend_form",
    "token_form",
]

_NARROWEST = 32
"""Columns that the smallest matrix instruction for bytes sums over."""
_TILE = 4096
"""Elements that a program that writes codes holds at a time."""
_SUMS_TILE = 1024
"""Sums that a program makes, one token after another: more programs hide that better than larger ones."""


_PART, _NARROW_PART = 64, 32
"""Columns whose sums of a block a program holds at a time, beside its float32 sums of all columns, and fewer where it holds
more besides: a mask's tile, or probabilities and values of 16 bits."""


class Codes(NamedTuple):
    """Codes, scales and means that the attention reads, as described above; tensors in a call.

    Attributes:
        query: Codes.
        factor: The factor of a query's scores; NaN where its outputs are.
        key: Codes.
        key_scale: Scales; 0 for tokens from N on.
        value: Codes; None, as all that follows, where values are plain.
        base: Where the sums of a block start.
        value_scale: float32 [heads, width].
        mean: float32 [heads, width], means of values.
    """

    query: Any
    factor: Any
    key: Any
    key_scale: Any
    value: Any
    base: Any
    value_scale: Any
    mean: Any


@dataclass(frozen=True)
class TokenForm:
    """Constants of the kernels that quantize.

    Attributes:
        head_size: D.
        width: Columns of the codes.
        tokens: Tokens, or blocks of 64 tokens, of a program.
    """

    head_size: int
    width: int
    tokens: int


class TokenTensors(NamedTuple):
    """Pointers of the kernels that quantize; what is not there is None.

    Attributes:
        x: [B, H, T, D] of any strides.
        partial: float32 [heads * blocks, width], sums of 64 tokens.
        low: Smallest numbers of 64 tokens, of the same shape.
        high: Largest ones.
        mean: float32 [heads, width].
        scale: float32, of tokens or of columns.
        clip: float32 [H].
        codes: int8.
        base: int32 [heads, blocks, width].
    """

    x: Any = None
    partial: Any = None
    low: Any = None
    high: Any = None
    mean: Any = None
    scale: Any = None
    clip: Any = None
    codes: Any = None
    base: Any = None


class TokenSizes(NamedTuple):
    """Batch times heads, H, T, T as it is padded, blocks of 64 tokens, x's strides, and the factor of stored scales."""

    all_heads: Any
    heads: Any
    tokens: Any
    padded: Any
    blocks: Any
    x_batch: Any
    x_head: Any
    x_token: Any
    x_column: Any
    factor: Any = 1.0


@dataclass(frozen=True)
class AttendForm:
    """Constants of the attention's kernel.

    Attributes:
        head_size: D.
        width: Columns of the codes.
        parts: The columns of a program's sums are computed in so many parts, one after another.
        part: Columns of each.
        ragged: Whether 64 does not divide N.
        mask: "none"; "keys": the same for all queries; "all".
        plain: Whether values are not quantized.
        interpreted: For Triton's interpreter.
    """

    head_size: int
    width: int
    parts: int
    part: int
    ragged: bool
    mask: str
    plain: bool
    interpreted: bool


class Statistics(NamedTuple):
    """Numbers of each query that a backward pass takes, made of the gradient of its outputs.

    Attributes:
        grad: That gradient, float32 [B, H, M, D], contiguous.
        top: Exponents E, float32 [heads, M], and so are the others.
        inverse: 1 / L; 1 where L is 0.
        expected: Sums of P dP over keys.
    """

    grad: Any
    top: Any
    inverse: Any
    expected: Any


class AttendTensors(NamedTuple):
    """Pointers of the attention's kernel: codes, outputs [B, H, M, D] contiguous or statistics, bool mask, plain values."""

    codes: Any
    y: Any
    mask: Any
    value: Any = None
    statistics: Any = None


class AttendSizes(NamedTuple):
    """H, M, N, blocks of 64 keys, the mask's strides, 0 where it has one for all, and plain values', whose columns follow."""

    heads: Any
    queries: Any
    keys: Any
    blocks: Any
    mask_batch: Any
    mask_head: Any
    mask_query: Any
    mask_key: Any
    value_batch: Any = 0
    value_head: Any = 0
    value_token: Any = 0


def _width_of(head_size: int) -> int:
    """Columns of codes: the power of two that holds D."""
    return max(_NARROWEST, 1 << (head_size - 1).bit_length())


def token_form(head_size: int, *, sums: bool = False) -> TokenForm:
    """The constants of the kernels that quantize; ``sums``: of those that sum over tokens."""
    width = _width_of(head_size)
    return TokenForm(head_size, width, (_SUMS_TILE if sums else _TILE) // width)


def attend_form(head_size: int, *, keys: int, mask: str, plain: bool, interpreted: bool) -> AttendForm:
    """The constants of the attention's kernel.

    Args:
        head_size: D.
        keys: N.
        mask: See :class:`AttendForm`.
        plain: Likewise.
        interpreted: For Triton's interpreter.
    """
    width = _width_of(head_size)
    part = _NARROW_PART if (mask == "all" or plain) and width > _PART else min(width, _PART)
    return AttendForm(head_size, width, width // part, part, keys % BLOCK != 0, mask, plain, interpreted)
