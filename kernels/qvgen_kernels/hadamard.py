"""Hadamard transform of the packed linear's input (kernels/README.md, step 1), in plain torch.

    sylvester    H = (H_b kron H_n) / sqrt(b n),  n = 2^m    H_n: Sylvester    H_b: Paley, over the integers modulo a prime
    regular      H = (R kron R kron ...) / sqrt(4^m)         R: 4 x 4, -1 on the other diagonal and 1 elsewhere

Written here a second time, on purpose: this package imports nothing of qvgen, whose training uses
qvgen/quant/hadamard.py, and tests hold the two to each other bit for bit. This one keeps the columns where they are
and so reads like the contract; the other transposes and is two to three times as fast.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["KINDS", "block_hadamard", "has_matrix", "paley_factor", "paley_signs", "rotation_sizes"]

KINDS = ("sylvester", "regular")
"""Kinds of rotation."""

CHUNK = 2**18
"""Elements transformed at a time on CPU (1 MiB): what is written is still in the cache when it is read again."""

_choices: dict[tuple[int, str], Tensor] = {}


@lru_cache(maxsize=4096)
def paley_factor(size: int) -> int:
    """The b of a block size: the smallest such that size / b is a power of two and H_b can be built; 0 if none."""
    powers = size & -size
    factors = (size // powers << shift for shift in range(powers.bit_length())) if size > 0 else ()
    return next((b for b in factors if b == 1 or _field(b)), 0)


def has_matrix(size: int, kind: str) -> bool:
    """Whether there is a matrix of this size: of the regular kind those of powers of 4."""
    if kind == "regular":
        return size >= 4 and size & (size - 1) == 0 and size.bit_length() % 2 == 1
    return paley_factor(size) > 0


def rotation_sizes(columns: int, kind: str = "sylvester") -> list[int]:
    """Every block size from 2 that divides ``columns`` and has a matrix, ascending."""
    return [size for size in range(2, columns + 1) if columns % size == 0 and has_matrix(size, kind)]


def _field(order: int) -> int:
    """The prime q of H_b: b = q + 1 with q = 3 mod 4, else b = 2 (q + 1) with q = 1 mod 4; 0 if there is none."""
    for q, fits in ((order - 1, order % 4 == 0), (order // 2 - 1, order % 8 == 4)):
        if fits and q > 1 and all(q % n for n in range(2, math.isqrt(q) + 1)):
            return q
    return 0


@lru_cache(maxsize=64)
def paley_signs(order: int) -> tuple[tuple[int, ...], ...]:
    """H_b, b = ``order``, by rows: 1 and -1, symmetric. Order 1 is the matrix 1."""
    if order == 1:
        return ((1,),)
    q = _field(order)
    assert q, f"no Paley matrix of order {order}"  # paley_factor
    character = [0] + [-1] * (q - 1)
    for root in range(1, q):
        character[root * root % q] = 1
    if order == q + 1:
        # q = 3 mod 4. i + j (not i - j, Paley's) makes it symmetric; i + j = 0 mod q counts as a non-square.
        core = [[1 if character[(i + j) % q] == 1 else -1 for j in range(1, q + 1)] for i in range(1, q + 1)]
        return ((1,) * order, *((1, *row) for row in core))
    # q = 1 mod 4: each entry of the bordered character matrix becomes two rows and two columns.
    pairs = {0: ((1, -1), (-1, -1)), 1: ((1, 1), (1, -1)), -1: ((-1, -1), (-1, 1))}
    border = [[0] + [1] * q] + [[1] + [character[(i - j) % q] for j in range(q)] for i in range(q)]
    return tuple(tuple(sign for entry in row for sign in pairs[entry][half]) for row in border for half in (0, 1))


def block_hadamard(x: Tensor, *, block: int, kind: str = "sylvester") -> Tensor:
    """Normalised Hadamard transform of every run of ``block`` columns; the order of operations is the contract's.

    Args:
        x: float32 [..., K].
        block: divides K and has a matrix (:func:`has_matrix`).
        kind: one of :data:`KINDS`.

    Returns:
        float32 [..., K], a new tensor. Within about log2(block / b) + 2 + b / 4 roundings of the exact transform.
    """
    rows = x.reshape(-1, x.shape[-1])
    step = max(1, CHUNK // rows.shape[1]) if x.device.type == "cpu" else max(1, len(rows))
    transform = _regular_transform if kind == "regular" else _transform
    return torch.cat([transform(part, block=block) for part in rows.split(step)]).reshape(x.shape)


def _transform(x: Tensor, *, block: int) -> Tensor:
    b = paley_factor(block)
    assert b, f"no Hadamard matrix of size {block}"  # LinearSpec
    y, stride = x, 1
    while stride < block // b:
        first, second = y.unflatten(-1, (-1, 2, stride)).unbind(-2)
        y = torch.stack((first + second, first - second), -2).flatten(-3)
        stride *= 2
    if b > 1:
        y = _paley_sums(y.unflatten(-1, (-1, b, block // b)), signs=paley_signs(b)).flatten(-3)
    return y * (1.0 / math.sqrt(block))


def _regular_transform(x: Tensor, *, block: int) -> Tensor:
    """Every digit of a column's number to the base 4 in turn, lowest first; eight additions for four elements."""
    assert has_matrix(block, "regular"), f"no regular Hadamard matrix of size {block}"  # LinearSpec
    y, stride = x, 1
    while stride < block:
        x0, x1, x2, x3 = y.unflatten(-1, (-1, 4, stride)).unbind(-2)
        low, high, first, second = x0 + x1, x2 - x3, x0 - x1, x2 + x3
        y = torch.stack((low + high, low - high, second + first, second - first), -2).flatten(-3)
        stride *= 4
    return y * (1.0 / math.sqrt(block))


def _paley_sums(x: Tensor, *, signs: tuple[tuple[int, ...], ...]) -> Tensor:
    """y_i = sum_j signs[i][j] x_j for x [..., b, n], four columns at a time as (h0 x0 + h1 x1) + (h2 x2 + h3 x3)."""
    b = len(signs)
    choices = _sign_choices(signs, x.device)
    y: Tensor | None = None
    for start in range(0, b, 4):
        x0, x1, x2, x3 = x[..., start : start + 4, :].unbind(-2)
        low, high = _four_signs(x0, x1), _four_signs(x2, x3)
        terms = (low.unsqueeze(-2) + high.unsqueeze(-3)).flatten(-3, -2)
        chosen = terms.index_select(-2, choices[start // 4])
        y = chosen if y is None else y.add_(chosen)
    assert y is not None  # b >= 4
    return y


def _sign_choices(signs: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """int64 [b/4, b]: which of the 16 sums of four runs each output takes; copied once, as a copy makes a device wait."""
    key = (len(signs), str(device))
    if key in _choices:
        return _choices[key]
    negative = (torch.tensor(signs, device="cpu") < 0).long().unflatten(1, (-1, 4))
    found = (negative * torch.tensor([8, 4, 2, 1], device="cpu")).sum(-1).t().contiguous().to(device)
    if type(found) is Tensor:  # not a tensor of a tracer
        _choices[key] = found
    return found


def _four_signs(a: Tensor, c: Tensor) -> Tensor:
    """Stack a + c, a - c, -a + c, -a - c; a negation is exact."""
    return torch.stack((a + c, a - c, c - a, -(a + c)), -2)
