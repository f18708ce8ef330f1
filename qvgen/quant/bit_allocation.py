"""Mixed precision: which bit-width every unit of layers has in every window of timesteps, from measured sensitivities.

Two levels, as ViDiT-Q (arXiv 2406.02540) has them, each solved exactly (:mod:`qvgen.quant.knapsack`):

    between groups   all units at once by their output error: how much of the budget each group gets
    inside a group   the units of that group by the group's own metric, under what the group got

Metrics of different groups are never added up. Errors of units are taken as additive, which is the one approximation.
What a unit loses at one width in all windows is measured as such: the same weights err in the same direction in every
step, and sums over windows were up to ten times too small (docs/log.md). Where the widths of its windows differ there is
only the sum: of amplitudes for output errors, (sum_w sqrt(e_w))^2.

A width may be fixed in some windows of timesteps (the released map of ViDiT-Q: 8 bits in the first quarter). The codes
of both widths are stored then. What a choice costs is either what is stored, the sum of both, or what runs, the mean over
the steps. By what is stored two sets are never worth it: the wider one alone costs less and loses less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qvgen.quant.knapsack import solve_knapsack


@dataclass(frozen=True, kw_only=True)
class SideProblem:
    """The allocation of one side (weights or activations).

    Attributes:
        groups: Group of each unit, [U].
        widths: Candidate bit-widths, rising, [B].
        output_error: float64 [U, B, W], squared error of the videos when that unit alone has that width in that window.
        score: float64 [U, B, W], by the group's own metric; in any unit that is one for the whole group.
        whole_error, whole_score: float64 [U, B], the same with that width in all windows.
        cost: float64 [U, B], whole numbers: what the unit's layers cost at that width.
        budget: Largest sum of costs.
    """

    groups: tuple[str, ...]
    widths: tuple[int, ...]
    output_error: Tensor
    score: Tensor
    whole_error: Tensor
    whole_score: Tensor
    cost: Tensor
    budget: float

    def __post_init__(self) -> None:
        shape = (len(self.groups), len(self.widths))
        for name, value in (("output_error", self.output_error), ("score", self.score)):
            if value.shape[:2] != shape or value.dim() != 3:
                raise ValueError(
                    f"{name} has shape {list(value.shape)}; {len(shape) + 1} dimensions {list(shape)} x W are needed"
                )
        if self.whole_error.shape != shape or self.whole_score.shape != shape:
            raise ValueError(f"whole_error and whole_score must have the shape {list(shape)}")
        if self.cost.shape != shape or bool((self.cost != self.cost.round()).any()):
            raise ValueError(f"cost must be whole numbers of shape {list(shape)}")


def constant_widths(
    problem: SideProblem, *, fixed: Sequence[int | None] | None = None, steps: Sequence[int] | None = None
) -> list[list[int]]:
    """One width per unit, but for windows whose width is fixed.

    Args:
        problem: The candidates.
        fixed: [W], the width of a window for all units, or None where it is the unit's; None: nowhere fixed.
        steps: [W], sampling steps of each window: the budget is of what runs in a step; None: of what is stored.

    Returns:
        Bits [U, W], by unit and window.

    Raises:
        ValueError: A fixed width that is no candidate, or a budget below the cheapest choice.
    """
    windows = problem.output_error.shape[2]
    fixed = [None] * windows if fixed is None else list(fixed)
    if len(fixed) != windows:
        raise ValueError(f"{len(fixed)} fixed widths for {windows} windows; give one for each, null where it is free")
    for width in fixed:
        if width is not None and width not in problem.widths:
            raise ValueError(f"the fixed width {width} is no candidate; add it to {list(problem.widths)}")
    options = [[width if held is None else held for held in fixed] for width in problem.widths]
    place = {width: index for index, width in enumerate(problem.widths)}
    chosen = torch.tensor([[place[width] for width in option] for option in options])  # [O, W]
    if steps is None:
        stored = [[place[width] for width in set(option)] for option in options]
        cost, budget = torch.stack([problem.cost[:, widths].sum(1) for widths in stored], 1), problem.budget
    else:
        cost = (problem.cost.double()[:, chosen] * _checked_steps(steps, windows)).sum(2)
        budget = problem.budget * sum(steps)

    def of_options(table: Tensor) -> Tensor:
        return table.double()[:, chosen, torch.arange(windows)]

    if all(held is None for held in fixed):
        error, score = problem.whole_error.double(), problem.whole_score.double()
    else:
        error, score = of_options(problem.output_error).sqrt().sum(2).square(), of_options(problem.score).sum(2)
    choice = _two_levels(problem.groups, error, score, cost, budget)
    return [options[index] for index in choice.tolist()]


def windowed_widths(problem: SideProblem, *, steps: Sequence[int]) -> list[list[int]]:
    """A width of its own for every unit and window.

    Args:
        problem: The candidates; the budget is of one step.
        steps: [W], sampling steps of each window: what its costs count.

    Returns:
        Bits [U, W], by unit and window.

    Raises:
        ValueError: A budget below the cheapest choice, or not one number of steps per window.
    """
    units, widths, windows = problem.output_error.shape
    cost = (problem.cost.double().unsqueeze(1) * _checked_steps(steps, windows).unsqueeze(1)).reshape(-1, widths)
    error, score = (table.double().mT.reshape(-1, widths) for table in (problem.output_error, problem.score))
    groups = [group for group in problem.groups for _ in range(windows)]
    choice = _two_levels(groups, error, score, cost, problem.budget * sum(steps)).view(units, windows)
    return [[problem.widths[index] for index in row] for row in choice.tolist()]


def _checked_steps(steps: Sequence[int], windows: int) -> Tensor:
    if len(steps) != windows or min(steps) < 1:
        raise ValueError(f"steps={list(steps)} must be {windows} positive numbers, one for each window")
    return torch.tensor(steps)


def _two_levels(groups: Sequence[str], error: Tensor, score: Tensor, cost: Tensor, budget: float) -> Tensor:
    """Option of every row, int64 [R]; tables are [R, O]."""
    between = solve_knapsack(error, cost, budget=budget)
    choice = between.clone()
    for group in dict.fromkeys(groups):
        rows = torch.tensor([index for index, name in enumerate(groups) if name == group])
        granted = float(cost[rows, between[rows]].sum())
        choice[rows] = solve_knapsack(score[rows], cost[rows], budget=granted)
    return choice
