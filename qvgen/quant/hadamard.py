"""Block-wise normalized Hadamard transform: spreads outliers over a block and leaves every product unchanged.

    y = x H        H = (H_b kron H_n) / sqrt(B)        B = b n, n = 2^m        for each run of B columns

is the kind "sylvester": H_n is Sylvester's matrix. H_b is 1, or Paley's (J. Math. Phys. 12, 1933) over the integers
modulo a prime q:

    I   b = q + 1,    q = 3 mod 4    H[i,j] = 1 if i = 0 or j = 0 or i + j is a nonzero square mod q, else -1
    II  b = 2(q + 1), q = 1 mod 4    H = C kron [[1, 1], [1, -1]] + I kron [[1, -1], [-1, -1]]
        C[i,j] = 0 if i = j, else 1 if i = 0 or j = 0 or i - j is a square mod q, else -1        (i, j = 0 .. q)

B takes the smallest b that it can (1920 = 60 * 32, 8960 = 140 * 64), type I where both exist. Paley's first matrix
is written with i + j, not i - j: a permutation of its columns that makes it symmetric. So every H is symmetric and
orthogonal: its own transpose and inverse, (x H)(W H)^T = x W^T, and the gradient's way back is the transform itself.
Prime powers are left out: 52 or 100, and 92 or 116, which need other constructions, have no matrix here.

Order of operations, fixed so that a row's result does not depend on its batch, and training equals deployment to the
bit (a matrix product would choose its own order of summation): butterflies with strides 1, 2, ..., n/2 within each n
columns; if b > 1, with x_j the j-th run of n columns and h = H[i,j], j = 0, 4, 8, ...

    y_i = t_0 + t_4 + t_8 + ... from left to right        t_j = (h x_j + h' x_{j+1}) + (h'' x_{j+2} + h''' x_{j+3})

and one multiplication by float32(B^-1/2). By fours (4 divides every Paley b), because the 16 possible t_j are computed
once and serve all b sums: b/4 additions an element, not b. kernels/qvgen_kernels/hadamard.py writes construction and
order a second time, on purpose: it imports nothing of qvgen, and tests hold the two together.

kind="regular" (ConvRot, arXiv 2512.03673, and ComfyUI's kernels) takes Kronecker powers of a 4 x 4 matrix instead:

    H = (R kron R kron ...) / sqrt(B)      B = 4^m      R[i,j] = -1 if i + j = 3, else 1

All its rows have the sum 1, so that a run of equal values stays one and does not become a spike. It is symmetric as well.
For strides 1, 4, ..., B/4, with x_0 .. x_3 a stride apart:

    y_0, y_1 = (x_0 + x_1) +- (x_2 - x_3)      y_2, y_3 = (x_2 + x_3) +- (x_0 - x_1)

Example:
    >>> import torch
    >>> hadamard_transform(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), block_size=4)
    tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    >>> hadamard_order(1920), hadamard_order(48), hadamard_order(52)
    (60, 12, None)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

KINDS = ("sylvester", "regular")
"""Kinds of rotation that a profile may name."""

_CPU_ELEMENTS = 2**18
"""Elements transformed at a time: 1 MiB and its scratch stay in a core's cache (4 times faster for B = 8960)."""
_DEVICE_ELEMENTS = 2**26
"""The number on other devices, where it only bounds the scratch memory (256 MiB a buffer) and each launch costs."""


def hadamard_transform(x: Tensor, *, block_size: int, kind: str = "sylvester") -> Tensor:
    """Transform x [..., K] by blocks of ``block_size`` columns, in float32; its own inverse and transpose.

    Raises:
        ValueError: ``block_size`` has no matrix of this kind here (:func:`has_matrix`), or does not divide K.
    """
    columns = x.shape[-1]
    if not has_matrix(block_size, kind) or columns % block_size:
        fitting = " or ".join(map(str, nearest_sizes(block_size, columns=columns, kind=kind))) or "1"
        if not has_matrix(block_size, kind):
            raise ValueError(f"block_size={block_size} has no {matrix_name(kind)} here; use {fitting}")
        raise ValueError(f"block_size={block_size} does not divide {columns} columns; use {fitting}")
    result: Tensor = _Transform.apply(x.float(), block_size, kind)  # type: ignore[no-untyped-call]
    return result


def matrix_name(kind: str) -> str:
    """How a message calls the matrices of a kind."""
    return "regular Hadamard matrix" if kind == "regular" else "Hadamard matrix"


def check_rotation(size: int, kind: str) -> None:
    """Raise ValueError for the size of a profile's blocks that is neither 0 nor one of a matrix."""
    if size and (size == 1 or not has_matrix(size, kind)):
        sizes = " or ".join(map(str, [0, *nearest_sizes(size, kind=kind)]))
        raise ValueError(f"rotation={size} has no {matrix_name(kind)} here; use {sizes}")


def read_rotation(value: int | Mapping[str, Any]) -> tuple[Any, tuple[int, ...]]:
    """Kind and sizes of a rotation as a profile's file gives it: a size of Sylvester's kind, or ``kind`` and ``sizes``.

    Raises:
        ValueError: A mapping with other keys, or without sizes.
    """
    if not isinstance(value, Mapping):
        return "sylvester", (value,)
    sizes = value.get("sizes")
    if set(value) != {"kind", "sizes"} or not isinstance(sizes, Sequence) or not sizes:
        raise ValueError(f"rotation={dict(value)} is no size; write a whole number, or kind and a list of sizes")
    return value["kind"], tuple(sizes)


def has_matrix(size: int, kind: str) -> bool:
    """Whether there is a matrix of this size: of the regular kind those of powers of 4, else :func:`hadamard_order` says."""
    if kind == "regular":
        return size >= 4 and size & (size - 1) == 0 and size.bit_length() % 2 == 1
    return hadamard_order(size) is not None


@lru_cache(maxsize=4096)
def hadamard_order(size: int) -> int | None:
    """The smallest b with size = b 2^m whose matrix can be built (1 for powers of two); None if there is none."""
    if size < 1:
        return None
    order = size // (size & -size)
    while size % order == 0:
        if order == 1 or _paley_prime(order) is not None:
            return order
        order *= 2
    return None


def nearest_sizes(size: int, *, columns: int | None = None, kind: str = "sylvester") -> list[int]:
    """Sizes from 2 that have a matrix (and divide ``columns``): the largest below and the smallest above ``size``."""
    top = columns or 4 * max(size, 1)

    def first(candidates: range) -> list[int]:
        fitting = (n for n in candidates if (columns is None or columns % n == 0) and has_matrix(n, kind))
        return [n for n in (next(fitting, None),) if n is not None]

    return first(range(min(size - 1, top), 1, -1)) + first(range(max(size + 1, 2), top + 1))


def largest_block(columns: int) -> int:
    """The largest size that divides ``columns`` and has a matrix: all of them at every width of the models; 0 for none."""
    return (nearest_sizes(columns + 1, columns=columns) or [0])[0]


def paley_matrix(order: int) -> list[list[int]]:
    """H_b of the module's header, b = ``order``: entries 1 and -1, symmetric, H H = b I."""
    if order == 1:
        return [[1]]
    prime = _paley_prime(order)
    assert prime is not None, f"order={order} is no order of Paley's"  # hadamard_order
    squares = {i * i % prime for i in range(1, prime)}
    if prime == order - 1:
        return [[1 if not i or not j or (i + j) % prime in squares else -1 for j in range(order)] for i in range(order)]

    def entry(row: int, column: int) -> int:
        i, j, both_odd = row // 2, column // 2, row % 2 and column % 2
        if i == j:
            return -1 if row % 2 or column % 2 else 1
        sign = 1 if not i or not j or (i - j) % prime in squares else -1
        return -sign if both_odd else sign

    return [[entry(row, column) for column in range(order)] for row in range(order)]


def _paley_prime(order: int) -> int | None:
    for prime, residue in ((order - 1, 3), (order // 2 - 1, 1)):
        if order % 4 or prime % 4 != residue or prime < 2:
            continue
        if all(prime % n for n in range(2, math.isqrt(prime) + 1)):
            return prime
    return None


@lru_cache(maxsize=64)
def _choices(order: int) -> list[list[int]]:
    """For j = 0, 4, 8, ...: which of the 16 t_j belongs to each row, h = -1 as bits 8, 4, 2, 1 in the order of j."""
    matrix = paley_matrix(order)
    return [[sum(8 >> k for k in range(4) if row[start + k] < 0) for row in matrix] for start in range(0, order - 1, 4)]


_kept_choices: dict[tuple[int, str], Tensor] = {}


def _choices_on(device: torch.device, order: int) -> Tensor:
    """:func:`_choices` as int64 [b/4, b], copied to a device once: a copy in every layer would make it wait."""
    if torch.compiler.is_compiling():
        return torch.tensor(_choices(order), device=device)
    key = (order, str(device))
    if key not in _kept_choices:
        with torch.inference_mode(False):
            made = torch.tensor(_choices(order), device="cpu").to(device)
        if type(made) is not Tensor:  # a tracer's own
            return made
        _kept_choices[key] = made
    return _kept_choices[key]


class _Transform(torch.autograd.Function):
    """The transform of float32 x [..., K]; symmetric, hence its own backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block_size: int, kind: str) -> Tensor:
        ctx.block_size, ctx.kind = block_size, kind
        rows = x.reshape(-1, x.shape[-1])
        result = torch.empty_like(rows, memory_format=torch.contiguous_format)
        order = 1 if kind == "regular" else hadamard_order(block_size)
        assert order is not None  # hadamard_transform
        choices = _choices_on(x.device, order)
        elements = _CPU_ELEMENTS if x.device.type == "cpu" else _DEVICE_ELEMENTS
        step = max(1, elements // rows.shape[1])
        for part, out in zip(rows.split(step), result.split(step), strict=True):
            # Columns first: every operation then runs along contiguous rows. A copy even where .t() is contiguous.
            y = torch.empty_like(part.t(), memory_format=torch.contiguous_format).copy_(part.t())
            if kind == "regular":
                y = _regular_sums(y, torch.empty_like(y), block_size)
            else:
                y, spare = _butterflies(y, torch.empty_like(y), block_size // order)
                if order > 1:
                    y = _paley_sums(y, spare, choices, block_size)
            torch.mul(y.t(), 1.0 / math.sqrt(block_size), out=out)
        return result.reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return hadamard_transform(grads[0], block_size=ctx.block_size, kind=ctx.kind), None, None


def _regular_sums(y: Tensor, spare: Tensor, size: int) -> Tensor:
    """The regular kind over y [K, rows], one digit to the base 4 of the column's number at a time; uses both buffers."""
    columns, rows = y.shape
    stride = 1
    while stride < size:
        x, out = (buffer.view(columns // (4 * stride), 4, stride, rows) for buffer in (y, spare))
        torch.add(x[:, 0], x[:, 1], out=out[:, 0])
        torch.sub(x[:, 2], x[:, 3], out=out[:, 1])
        torch.add(x[:, 2], x[:, 3], out=out[:, 2])
        torch.sub(x[:, 0], x[:, 1], out=out[:, 3])
        for first, second in ((0, 1), (2, 3)):
            torch.add(out[:, first], out[:, second], out=x[:, first])
            torch.sub(out[:, first], out[:, second], out=x[:, second])
        stride *= 4
    return y


def _butterflies(y: Tensor, spare: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Sylvester's part over y [K, rows], each pass from one buffer into the other; returns both, result first."""
    columns, rows = y.shape
    stride = 1
    while stride < size:
        pairs, out = (buffer.view(columns // (2 * stride), 2, stride, rows) for buffer in (y, spare))
        torch.add(pairs[:, 0], pairs[:, 1], out=out[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=out[:, 1])
        y, spare = spare, y
        stride *= 2
    return y, spare


def _paley_sums(y: Tensor, out: Tensor, choices: Tensor, block_size: int) -> Tensor:
    """Paley's part over y [K, rows] into ``out``."""
    order = choices.shape[1]
    blocks = y.shape[0] // block_size
    shape = (blocks, order, block_size // order * y.shape[1])
    for source, target in zip(y.view(shape), out.view(shape), strict=True):
        for group, (four, choice) in enumerate(zip(source.split(4), choices, strict=True)):
            terms = (_signed_sums(four[0], four[1])[:, None] + _signed_sums(four[2], four[3])).flatten(0, 1)
            if group == 0:
                torch.index_select(terms, 0, choice, out=target)
            else:
                target.add_(terms.index_select(0, choice))
    return out


def _signed_sums(a: Tensor, b: Tensor) -> Tensor:
    """[4, ...]: a + b, a - b, -a + b, -a - b; negation is exact, so two additions make the four."""
    total, difference = a + b, a - b
    return torch.stack((total, difference, -difference, -total))


def random_signs(size: int, *, key: str) -> Tensor:
    """D of a random Hadamard matrix D H: +-1, float32 [size], the same for the same key.

    H alone turns a row whose entries have a mean, such as what a GELU puts out, into one spike in its first column; H after
    random signs does not.
    """
    digest = hashlib.blake2b(f"{key}/{size}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1.0
