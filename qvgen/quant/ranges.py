"""Where a weight's range should end: the search that starts learned scales (QVGen release; OpenQuant-style MSE).

For every row (or group) the candidates are its minimum and maximum (0 included, but for real zero points), shrunk by p =
1 - i/100 for i = 0..79. The one with the least sum |fake_quantize(w) - w|^2.4 wins; the exponent between 2 and 3 protects
the large weights a little more than a plain MSE. Candidate 0 is the plain minimum and maximum, so the result is never
worse than that by this measure. The first of equal candidates (the widest range) is kept.

Most candidates are hopeless, and are not computed in full; the result is the same to the bit. Where the CPU kernels are
built, ``qvgen_kernels.range_search`` computes all errors to a thousandth, and those candidates of a row are compared exactly
that may be its best. Elsewhere: a narrow range loses by what it cuts off, which is all in a row's largest values, and where
the error of the largest eighth alone is above the best one found, for every row of a piece, the rest of the candidate's
errors is not computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvgen.quant.affine import clipped_range, qparams_from_range, round_to_grid, to_rows
from qvgen.quant.grid import Grid
from qvgen_kernels.range_search import ACCURACY, range_errors, refusal

NUM_CANDIDATES = 80
EXPONENT = 2.4

LARGEST_SHARE = 8
"""Stride of the values of a row that are looked at first, to discard hopeless ranges before all values are."""

CERTAIN = 0.999
"""Sums of float32 err by less than a thousandth, whatever their order: a bound counts by this much."""

CACHED_ELEMENTS = 1 << 18
"""Values that are searched at once: 1 MiB of float32, which stays in the cache with its scratch memory."""


MARGIN = (1 + ACCURACY) ** 2 / CERTAIN**2
"""A candidate whose approximate error is above the least one by this factor can't have the least exact error."""

TRUSTED = (1e-25, 1e30)
"""Least errors of a row between which approximations are believed; elsewhere powers under- or overflow."""


def search_qparams(weight: Tensor, *, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point with the least error |.|^2.4 per row (or group) of a weight.

    Rows are searched in pieces that stay in a core's cache while the candidates are walked one by one: four times
    faster than the whole weight at once (1920 x 7680), and with scratch memory of a few MiB.

    Args:
        weight: [N, K], any float dtype.
        grid: per_channel or per_group.

    Returns:
        scale and zero_point, float32, [N, 1] or [N, K / group_size].
    """
    rows = to_rows(weight.float(), grid)
    columns = rows.shape[-1]
    pieces = rows.reshape(-1, columns).split(max(1, CACHED_ELEMENTS // columns))
    pairs = [_search_rows(piece, grid) for piece in pieces]
    shape = (*weight.shape[:-1], grid.num_groups(weight.shape[-1]))
    scale, zero_point = (torch.cat([pair[side] for pair in pairs]).reshape(shape) for side in (0, 1))
    return scale, zero_point


def _search_rows(rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point [R, 1] each of rows [R, columns]."""
    low, high = clipped_range(rows, grid=grid)
    return _walk(rows, low, high, grid) if refusal(rows) else _compare_few(rows, low, high, grid)


def _compare_few(rows: Tensor, low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The search by approximate errors of all candidates, and exact ones of those that may be best."""
    shrink = torch.tensor([1.0 - index / 100 for index in range(NUM_CANDIDATES)], device=rows.device)
    scale, zero_point = qparams_from_range(low * shrink, high * shrink, grid)
    approximate = range_errors(
        rows,
        divisor=scale,
        scale=scale,
        zero=zero_point,
        codes=(grid.qmin, grid.qmax),
        real=grid.zero_point == "real",
        margin=MARGIN,
    )
    least = approximate.amin(1, keepdim=True)
    is_trusted = (least > TRUSTED[0]) & (least < TRUSTED[1])
    row, candidate = ((approximate <= least * MARGIN) | ~is_trusted).nonzero(as_tuple=True)
    error = torch.full_like(approximate, torch.inf)
    size = max(1, CACHED_ELEMENTS // rows.shape[1])
    for some, which in zip(row.split(size), candidate.split(size), strict=True):
        one_each = (scale[some, which].unsqueeze(1), zero_point[some, which].unsqueeze(1))
        error[some, which] = _errors(rows[some], *one_each, grid).squeeze(1)
    error.nan_to_num_(nan=torch.inf, posinf=torch.inf)
    best = error.argmin(1, keepdim=True)  # the first of equal ones
    return scale.gather(1, best), zero_point.gather(1, best)


def _walk(rows: Tensor, low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The search by exact errors, candidate after candidate, in torch."""
    best_scale, best_zero = qparams_from_range(low, high, grid)
    best_error = torch.full_like(best_scale, torch.inf)
    columns = rows.shape[-1]
    largest = rows.gather(-1, rows.abs().topk(max(1, columns // LARGEST_SHARE), dim=-1, sorted=False).indices)
    improved = True
    for index in range(NUM_CANDIDATES):
        shrink = 1.0 - index / 100
        scale, zero_point = qparams_from_range(low * shrink, high * shrink, grid)
        # Worth a look once ranges are no longer too wide.
        if not improved and bool((CERTAIN * _errors(largest, scale, zero_point, grid) >= best_error).all()):
            continue
        error = _errors(rows, scale, zero_point, grid)
        better = error < best_error
        improved = bool(better.any())
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero_point, best_zero)
    return best_scale, best_zero


def _errors(rows: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Sum of |fake_quantize(w) - w|^2.4 over each row, [R, 1]."""
    codes = round_to_grid(rows, scale, zero_point, grid).clamp_(grid.qmin, grid.qmax)
    return codes.sub_(zero_point).mul_(scale).sub_(rows).abs_().pow_(EXPONENT).sum(-1, keepdim=True)
