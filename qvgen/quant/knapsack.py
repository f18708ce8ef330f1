"""Mixed precision as an integer program: one option (say, a bit-width) per group of layers, under a budget.

    minimise sum_g sensitivity[g, o_g]   subject to   sum_g cost[g, o_g] <= budget                    (1)

This is the multiple-choice knapsack problem. It is solved exactly, group by group: a *state* is a choice for the groups
so far, with its cost and its sum; a state that another one beats in both is dropped (dynamic programming by
dominance), and so is one that can't reach the best complete choice known, by the bound that the linear relaxation
of the groups to come gives (their lower convex hulls, cheapest gain first; Pisinger 1995). Some hundred groups with
four or so options take well under a second. Sensitivities that are a near-linear function of cost defeat both prunings;
above 2^20 states the search gives up with an error.

Why no MIP solver: those stop at tolerances (a gap of 1e-6, a budget overrun of 1e-7), so that of two budgets the larger one
could get the larger sum, and they settle equal sums by accident. Here sums are plain float64 sums from the first group to
the last, and equal ones go to the lower cost, then to the lower option in the first group that differs. tests compare
with scipy's.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SLACK = 1e-9
"""Relative rounding error that pruning allows for; the result is decided by exact comparisons."""

_MAX_STATES = 1 << 20

Floats = NDArray[np.float64]


def solve_knapsack(sensitivity: Tensor, cost: Tensor, *, budget: float) -> Tensor:
    """The best option of every group.

    Args:
        sensitivity: float64 [groups, options], finite; what is lost with the option, in any unit that adds up.
        cost: float64 [groups, options], finite, >= 0; for example weights times bits. Whole numbers stay exact.
        budget: Largest allowed sum of costs, in the unit of ``cost``.

    Returns:
        int64 [groups], the index of the option. Exact; a larger budget never has a larger sum.

    Raises:
        ValueError: Shapes or values outside of what is said here; a budget below the cheapest choice;
            a problem with more than 2^20 states (see the module).

    Example:
        >>> sensitivity = torch.tensor([[9.0, 1.0], [5.0, 4.0]])  # two groups at 4 and at 8 bits
        >>> solve_knapsack(sensitivity, torch.tensor([[4.0, 8.0], [4.0, 8.0]]), budget=12).tolist()
        [1, 0]
    """
    if sensitivity.shape != cost.shape or sensitivity.dim() != 2 or 0 in sensitivity.shape:
        raise ValueError(
            f"sensitivity {list(sensitivity.shape)} and cost {list(cost.shape)} don't fit; give [groups, options] twice"
        )
    if not (sensitivity.isfinite().all() and cost.isfinite().all()) or (cost < 0).any():
        raise ValueError("sensitivity and cost must be finite and cost >= 0; leave unmeasured groups out")
    s, c = (value.detach().double().cpu().numpy() for value in (sensitivity, cost))
    cheapest = float(np.cumsum(c.min(1))[-1])
    if not cheapest <= budget:
        raise ValueError(
            f"budget={budget:g} is below the cheapest choice; the smallest feasible budget is {cheapest!r}"
        )
    return torch.from_numpy(_solve(s, c, budget))


@dataclass(frozen=True)
class _Rest:
    """Groups from some index on: the base (each at its cheapest) and the gains beyond it, best per cost first."""

    cost: float
    total: float
    gain_costs: Floats
    gains: Floats

    def bound(self, costs: Floats, totals: Floats, budget: float) -> Floats:
        """Lower bounds of the complete sums of states."""
        return totals + self.total - np.interp(budget - costs - self.cost, self.gain_costs, self.gains)

    def reachable(self, cost: float, total: float, budget: float) -> float:
        """A sum that some completion of a state has: the gains that fit, as long as they fit in order."""
        left = budget - cost - self.cost
        count = int(np.searchsorted(self.gain_costs, left, side="right"))
        return total + self.total - float(self.gains[count - 1]) if count else np.inf


def _hull(sensitivity: Floats, cost: Floats) -> tuple[float, float, list[tuple[float, float]]]:
    """Cheapest cost, its sum, and the steps (cost, gain) of the lower convex hull, in falling gain per cost."""
    points: list[tuple[float, float]] = []
    for index in np.lexsort((sensitivity, cost)):
        point = (float(cost[index]), float(sensitivity[index]))
        if points and point[1] >= points[-1][1]:
            continue
        while len(points) > 1 and (points[-2][1] - points[-1][1]) * (point[0] - points[-1][0]) <= (
            points[-1][1] - point[1]
        ) * (points[-1][0] - points[-2][0]):
            points.pop()
        points.append(point)
    steps = [(b[0] - a[0], a[1] - b[1]) for a, b in pairwise(points)]
    return (*points[0], steps)


def _rests(sensitivity: Floats, cost: Floats) -> list[_Rest]:
    """The rest from every group on, and an empty one at the end."""
    rests = [_Rest(0.0, 0.0, np.zeros(1), np.zeros(1))]
    steps: list[tuple[float, float]] = []
    for s, c in zip(sensitivity[::-1], cost[::-1], strict=True):
        low, total, new = _hull(s, c)
        steps = sorted(steps + new, key=lambda step: -step[1] / step[0])
        sums = np.cumsum(np.array([(0.0, 0.0), *steps]), axis=0)
        rests.append(_Rest(rests[-1].cost + low, rests[-1].total + total, sums[:, 0], sums[:, 1]))
    return rests[::-1]


def _solve(sensitivity: Floats, cost: Floats, budget: float) -> NDArray[np.int64]:
    """States are kept in the order of their choices, so that a position is a rank among equals."""
    rests, options = _rests(sensitivity, cost), cost.shape[1]
    slack = _SLACK * float(np.abs(sensitivity).max(1).sum())
    # A gain may hang on the last bit of the budget: bounds see a little more of it, known choices a little less.
    over, under = budget + _SLACK * abs(budget), budget - _SLACK * abs(budget)
    costs, totals = np.zeros(1), np.zeros(1)
    best = rests[0].reachable(0.0, 0.0, under) + slack
    history: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for group, rest in enumerate(rests[1:]):
        costs = (costs[:, None] + cost[group]).ravel()
        totals = (totals[:, None] + sensitivity[group]).ravel()
        last = group == len(cost) - 1
        bounds = rest.bound(costs, totals, over)
        fits = costs <= budget if last else costs + rest.cost <= over
        if costs.size > _MAX_STATES:
            raise ValueError(
                f"{costs.size} choices of {group + 1} groups tie too closely; merge groups or round the costs"
            )
        kept = np.flatnonzero(fits & (bounds <= best))
        kept = np.sort(kept[_undominated(costs[kept], totals[kept])])
        costs, totals = costs[kept], totals[kept]
        history.append((kept // options, kept % options))
        if not last:
            first = int(bounds[kept].argmin())
            best = min(best, rest.reachable(float(costs[first]), float(totals[first]), under) + slack)
    state = int(np.lexsort((costs, totals))[0])
    choice = np.empty(len(cost), np.int64)
    for group in range(len(cost) - 1, -1, -1):
        parents, chosen = history[group]
        choice[group], state = chosen[state], parents[state]
    return choice


def _undominated(costs: Floats, totals: Floats) -> NDArray[np.int64]:
    """Indices of the states that none beats or equals at the same or a lower cost; the first of equal ones."""
    order = np.lexsort((totals, costs))  # stable: equal states stay in their order
    lowest = np.minimum.accumulate(totals[order])
    new = np.r_[True, lowest[1:] < lowest[:-1]]
    kept: NDArray[np.int64] = order[new[: len(order)]]
    return kept
