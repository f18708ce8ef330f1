"""Bounded-init grid refinement: scale, zero point and codes of every row by turns, from a clamped range.

DVD-Quant (arXiv 2505.18663), data-free. For a row w of the weight (or one group of it), with codes q:

    s = <q - z, w> / <q - z, q - z>,    z = clamp(round(mean(q - w / s)), 0, qmax),    q = clamp(round(w / s) + z)

Each of the three is the least-squares optimum given the other two, so |w - s (q - z)|^2 never grows. Real zero points are
not rounded, and those of rows that do not contain 0 not clamped to codes; symmetric grids have z = 0 and skip its step.
Scales are rounded to the grid's dtype and floats round,
which may spoil a step by a little: a step is taken only if it makes the row's error smaller, else the row stays as it
is from there on. No formula bounds s > 0 (all codes may be on the wrong side of a bad z): such a step is not taken.

The alternation finds a local optimum near its start, so the start decides: of the row's minimum and maximum times 1,
0.9, ..., 0.2, the one with the least error. Measured |W - W_q|^2 / |W|^2 (32 rows of 1920, integer z):

                        3 bits                                  2 bits
              min/max   |.|^2.4   1, .8, .6, .4   chosen        min/max   |.|^2.4   1, .8, .6, .4   chosen
    Gaussian  0.0820    0.0409    0.0402          0.0402        0.4367    0.1499    0.1483          0.1483
    Laplace   0.1705    0.0738    0.0708          0.0708        0.5860    0.2099    0.2049          0.2049
    t(3)      0.3883    0.2199    0.1963          0.1963        0.6571    0.3722    0.3479          0.3427
    outliers  0.5159    0.3154    0.2549          0.2505        0.6666    0.4739    0.4684          0.3986

(outliers: 0.2 % of a Gaussian row times 16; |.|^2.4: :mod:`qvgen.quant.ranges`, another measure.) 80 starts are 1 %
better on the last one at 2 bits and equal elsewhere; 100 iterations gain nothing over 30 but 0.5 % on real z.

Left out: values whose squares are no float32 (differences above 1e19): such a row keeps its minimum and maximum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qvgen.quant.affine import (
    clipped_range,
    qparams_from_range,
    round_scale,
    round_to_grid,
    scale_bounds,
    to_rows,
    usable_zero_point,
)
from qvgen.quant.grid import Grid
from qvgen.quant.precision import has_float64

START_RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
"""Shares of the row's range (minimum and maximum, 0 included) that are tried as the start."""

MAX_ITERATIONS = 30

_CHUNK_ELEMENTS = 1 << 18
"""Values that are worked on together: the scratch memory (a few MB) stays in the cache whatever the weight's size."""


@dataclass(frozen=True, kw_only=True)
class RefinedGrid:
    """The grid and the codes of a weight after refinement; G is the number of groups of a row, 1 for per_channel.

    Attributes:
        scale: float32 [N, G], > 0.
        zero_point: float32 [N, G], 0..qmax (but for real ones of rows that do not contain 0); whole numbers on an integer
            grid, 0 on a symmetric one.
        codes: uint8 or int8 [N, K]; bitwise ``quantize(weight)`` with this scale and zero point.
        errors: float64 [iterations + 1, N, G], |w - s (q - z)|^2 at the start and after each iteration; on the CPU where the
            device has no float64, as all of the work is then.
    """

    scale: Tensor
    zero_point: Tensor
    codes: Tensor
    errors: Tensor


@dataclass
class _State:
    """The present grid of R rows: scale, zero_point and error [R, 1], codes float32 [R, columns]."""

    scale: Tensor
    zero_point: Tensor
    codes: Tensor
    error: Tensor

    def keep_better_(self, other: _State) -> Tensor:
        """Replace, in place, the rows whose error is smaller in the other state; returns a mask [R, 1] of these rows."""
        better = other.error < self.error
        for name in ("scale", "zero_point", "codes", "error"):
            setattr(self, name, torch.where(better, getattr(other, name), getattr(self, name)))
        return better


@torch.no_grad()
def refine_grid(weight: Tensor, *, grid: Grid) -> RefinedGrid:
    """Scale, zero point and codes of a weight with a small |W - W_q|^2, every row or group by itself.

    Args:
        weight: [N, K], any float dtype.
        grid: per_channel or per_group.

    Returns:
        See :class:`RefinedGrid`; the error is never above that of the plain minimum and maximum.
    """
    home = weight.device
    rows = to_rows(weight.float(), grid).reshape(-1, grid.group_size or weight.shape[-1])
    rows = rows if has_float64(home) else rows.cpu()
    size = max(1, _CHUNK_ELEMENTS // rows.shape[-1])  # the same for equal shapes: a row's bits don't depend on others
    parts = [_refine_rows(chunk, grid) for chunk in rows.split(size)]
    shape = (weight.shape[0], grid.num_groups(weight.shape[-1]))
    codes = torch.cat([state.codes.to(torch.int8 if grid.symmetric else torch.uint8) for state, _ in parts])
    iterations = max(len(errors) for _, errors in parts)
    errors = torch.cat([torch.stack(errors + errors[-1:] * (iterations - len(errors))) for _, errors in parts], dim=1)
    return RefinedGrid(
        scale=torch.cat([state.scale for state, _ in parts]).reshape(shape).to(home),
        zero_point=torch.cat([state.zero_point for state, _ in parts]).reshape(shape).to(home),
        codes=codes.reshape(weight.shape).to(home),
        errors=errors.reshape(iterations, *shape),
    )


def _refine_rows(rows: Tensor, grid: Grid) -> tuple[_State, list[Tensor]]:
    """The state at the fixed point of rows [R, columns], and the errors [R, 1] on the way."""
    low, high = clipped_range(rows, grid=grid)
    state = _evaluate(rows, *qparams_from_range(low, high, grid), grid)
    for ratio in START_RATIOS[1:]:
        state.keep_better_(_evaluate(rows, *qparams_from_range(low * ratio, high * ratio, grid), grid))
    errors = [state.error]
    for _ in range(MAX_ITERATIONS):
        scale = _best_scale(rows, state, grid)
        better = state.keep_better_(_evaluate(rows, scale, _best_zero_point(rows, state, scale, grid), grid))
        if not better.any():
            break
        errors.append(state.error)
    return state, errors


def _evaluate(rows: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> _State:
    """Nearest codes and their squared error."""
    codes = round_to_grid(rows, scale, zero_point, grid).clamp_(grid.qmin, grid.qmax)
    return _State(scale, zero_point, codes, _sum((codes - zero_point).mul_(scale).sub_(rows).square_()))


def _sum(rows: Tensor) -> Tensor:
    """Sums [R, 1] in float64: steps get small near the fixed point, and a float32 sum's noise would end it early."""
    return rows.sum(-1, keepdim=True, dtype=torch.float64)


def _best_scale(rows: Tensor, state: _State, grid: Grid) -> Tensor:
    steps = state.codes - state.zero_point
    scale = (_sum(steps * rows) / _sum(steps.square())).float()
    floor, ceiling = scale_bounds(grid)
    usable = scale.isfinite() & (scale >= floor) & (scale <= ceiling)
    return torch.where(usable, round_scale(scale, grid), state.scale)


def _best_zero_point(rows: Tensor, state: _State, scale: Tensor, grid: Grid) -> Tensor:
    if grid.symmetric:
        return state.zero_point
    zero_point = (_sum(state.codes - rows * (1.0 / scale)) / rows.shape[-1]).float()
    inside = zero_point.clamp(0, grid.qmax)
    if grid.zero_point == "integer":
        return inside.round()
    has_zero = (rows.amin(-1, keepdim=True) <= 0) & (rows.amax(-1, keepdim=True) >= 0)
    return torch.where(has_zero, inside, usable_zero_point(zero_point, grid))
