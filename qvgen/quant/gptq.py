"""GPTQ (arXiv 2210.17323): round a weight column by column, and let later columns make up for the error of earlier ones.

The layer's output error on inputs X is, per row of the weight, e H e^T with e = w - w_q and H the second moment X^T X
(any positive multiple of it gives the same codes). Let H = V V^T with V upper triangular. Then

    e H e^T = sum_i (e V)_i^2,     (e V)_i = e_i V_ii + sum_{j<i} e_j V_ji

so with the columns before i rounded, the best code of column i is the one nearest to

    w_i + sum_{j<i} e_j V_ji / V_ii.                                                            (1)

This is GPTQ with a half of its work: the paper factorizes H^-1 = U^T U (an inversion between two Cholesky
decompositions, U = V^-1) and updates all later columns after each one, which adds up to the same sum (1). Here the one
Cholesky decomposition is of H with its columns in reverse order, in float64; nothing is inverted. The sum (1) is
evaluated in float32 for blocks of 128 columns: one matrix product for all columns before the block, column by column
inside.

- Order: ``activation`` rounds the columns with the largest H_jj first (the paper's act-order), ``natural`` from left to
  right. Scales belong to columns, not to positions, so a permuted column keeps its group's scale.
- Damping: ``damping`` times the mean of H_jj is added to the diagonal, as in the paper. Where H is still not
  positive definite, ten times more, and so on up to 10^3 times that mean.
- Dead columns (H_jj = 0): any code costs nothing, and they are rounded to nearest. They count in no mean.
- Never worse than rounding to nearest: a clamp at the end of the grid is an error that (1) does not foresee. Every
  row is compared by e H e^T, undamped, and keeps its nearest codes if they are as good.

Memory: about 24 K^2 bytes at the peak (4.6 GB for K = 13824), 20 N K while rounding. Time: K^3 / 3 float64 operations
and 3 N K^2 float32 ones.

Left out: learning the scales. They are given and stay as they are.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qvgen.quant.affine import dequantize, quantize, round_to_grid
from qvgen.quant.grid import Grid
from qvgen.quant.precision import to_float64

BLOCK_COLUMNS = 128
"""Columns whose mutual sums are done one by one; a matter of speed alone."""

MAX_DAMPING = 1e3

Order = Literal["activation", "natural"]


@torch.no_grad()
def gptq_round(
    weight: Tensor,
    second_moment: Tensor,
    *,
    scale: Tensor,
    zero_point: Tensor,
    grid: Grid,
    damping: float = 0.01,
    order: Order = "activation",
) -> Tensor:
    """Codes of a weight that minimise the layer's output error greedily, on a given grid.

    Args:
        weight: W [N, K], any float dtype.
        second_moment: H float32 or float64 [K, K], symmetric: sum or mean of x^T x over input rows, of the input as the
            weight meets it (smoothed, rotated).
        scale: float32 [N, 1] or [N, K / group_size].
        zero_point: float32, shape of ``scale``.
        grid: per_channel or per_group.
        damping: > 0, share of the mean diagonal that is added to the diagonal.
        order: Which columns are rounded first.

    Returns:
        uint8 or int8 [N, K], as :func:`qvgen.quant.affine.quantize` gives; ``dequantize`` them for the values. Exact
        but for ties: codes may differ from exact arithmetic where a value is within about 1e-5 steps of one. e H e^T of
        every row is at most that of ``quantize`` (1e-5 relative: float32).

    Raises:
        ValueError: A shape, a value or a name outside of what is said here; H that no damping makes positive definite.
    """
    _check(weight, second_moment, damping=damping, order=order)
    nearest = quantize(weight, scale=scale, zero_point=zero_point, grid=grid)
    columns = weight.shape[1]
    diagonal = second_moment.diagonal()
    if order == "activation":
        permutation = diagonal.argsort(descending=True, stable=True)
    else:
        permutation = torch.arange(columns, device=weight.device)
    factor = _unit_factor(second_moment, permutation, damping=damping)
    permuted = _round_columns(
        weight.float().mT[permutation],
        factor,
        groups=(permutation // (grid.group_size or columns)).tolist(),
        scale=scale.mT,
        zero_point=zero_point.mT,
        grid=grid,
    )
    codes = torch.empty_like(nearest)
    codes[:, permutation] = permuted.mT.to(nearest.dtype)
    better = _is_better(codes, nearest, weight, second_moment, scale=scale, zero_point=zero_point, grid=grid)
    return torch.where(better, codes, nearest)


def _check(weight: Tensor, second_moment: Tensor, *, damping: float, order: str) -> None:
    columns = weight.shape[1]
    if second_moment.shape != (columns, columns):
        raise ValueError(f"second_moment {list(second_moment.shape)} does not fit in_features={columns}; give [K, K]")
    if not damping > 0:
        raise ValueError(f"damping={damping} is not positive; 0.01 is usual")
    if order not in ("activation", "natural"):
        raise ValueError(f"order={order!r} is unknown; use activation or natural")
    diagonal = second_moment.diagonal()
    if not second_moment.isfinite().all() or (diagonal < 0).any():
        raise ValueError("second_moment has a value that is not finite or a negative diagonal; check the calibration")


def _unit_factor(second_moment: Tensor, permutation: Tensor, *, damping: float) -> Tensor:
    """V_ji / V_ii [j, i] float32 of the permuted, damped H = V V^T; upper triangular with a diagonal of ones."""
    backwards = permutation.flip(0)
    moment = to_float64(second_moment[backwards.unsqueeze(-1), backwards])
    diagonal = moment.diagonal()
    dead = diagonal == 0
    if dead.all():
        return torch.eye(len(moment), device=second_moment.device)
    mean = diagonal[~dead].mean()
    moment[dead] = 0.0
    moment[:, dead] = 0.0
    diagonal += torch.where(dead, mean, damping * mean)
    while True:
        lower, failed = torch.linalg.cholesky_ex(moment)
        if not failed.item():
            break
        if damping >= MAX_DAMPING:
            raise ValueError(f"second_moment is not positive definite with {damping:g} of its mean diagonal added")
        diagonal += 9 * damping * mean
        damping *= 10
    del moment
    # Flipped in both directions, L of the reversed H is V; V_ii divides column i.
    unit: Tensor = lower.div_(lower.diagonal().clone()).float().flip(0, 1)
    return unit.to(second_moment.device)


def _round_columns(
    columns: Tensor, factor: Tensor, *, groups: list[int], scale: Tensor, zero_point: Tensor, grid: Grid
) -> Tensor:
    """Codes [K, N] (whole float32 numbers) of columns [K, N], first to last by equation (1).

    Columns come as rows, so that each one is contiguous. ``scale`` and ``zero_point`` are [G, N]; ``groups`` says which
    row of them each column has.
    """
    errors, codes = torch.empty_like(columns), torch.empty_like(columns)
    for start in range(0, len(columns), BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, len(columns))
        block = torch.addmm(columns[start:end], factor[:start, start:end].mT, errors[:start])
        for i in range(start, end):
            s, z = scale[groups[i]], zero_point[groups[i]]
            codes[i] = round_to_grid(block[i - start], s, z, grid).clamp_(grid.qmin, grid.qmax)
            errors[i] = columns[i] - s * (codes[i] - z)
            block[i - start + 1 :].addr_(factor[i, i + 1 : end], errors[i])
    return codes


def _is_better(
    codes: Tensor,
    other: Tensor,
    weight: Tensor,
    second_moment: Tensor,
    *,
    scale: Tensor,
    zero_point: Tensor,
    grid: Grid,
) -> Tensor:
    """Rows [N, 1] whose e H e^T is smaller with ``codes`` than with ``other``.

    a H a^T - b H b^T = (a - b) H (a + b)^T: one product instead of two, and no difference of two large numbers. Rows
    and H are divided by their largest value first, for float32's range; that changes no sign.
    """
    values, other_values = (dequantize(q, scale=scale, zero_point=zero_point, grid=grid) for q in (codes, other))
    difference = other_values - values
    total = 2.0 * weight.float() - values - other_values
    moment = (second_moment / second_moment.diagonal().amax().clamp(min=torch.finfo(torch.float32).tiny)).float()
    total /= total.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    difference /= difference.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return ((difference @ moment) * total).sum(-1, keepdim=True) < 0
