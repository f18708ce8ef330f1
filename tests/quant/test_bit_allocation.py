"""The two-level allocation against enumeration: first all units by output error, then each group by its own score."""

from __future__ import annotations

import itertools

import pytest
import torch

from qvgen.quant.bit_allocation import SideProblem, constant_widths, windowed_widths

WIDTHS = (4, 6, 8)
GROUPS = ("cross_attention", "ffn", "ffn", "cross_attention", "other")


def problem(seed: int, *, budget: float, windows: int = 2, widths=WIDTHS, groups=GROUPS) -> SideProblem:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(groups), len(widths), windows)
    falling = 4.0 ** -torch.tensor(widths).double().view(1, -1, 1)
    error, score = (falling * (0.1 + torch.rand(shape, generator=generator).double()) for _ in range(2))
    whole = [windows * falling[..., 0] * (0.1 + torch.rand(shape[:2], generator=generator).double()) for _ in range(2)]
    size = torch.randint(1, 9, (len(groups), 1), generator=generator).double()
    cost = size * torch.tensor(widths)
    return SideProblem(
        groups=groups,
        widths=widths,
        output_error=error,
        score=score,
        whole_error=whole[0],
        whole_score=whole[1],
        cost=cost,
        budget=budget * float(size.sum()),
    )


def best(tables, costs, budget):
    """Enumeration: options [rows][options] -> indices with the least sum, then the least cost, then the first."""
    found = None
    for choice in itertools.product(*(range(len(row)) for row in tables)):
        cost = sum(row[index] for row, index in zip(costs, choice, strict=True))
        total = sum(row[index] for row, index in zip(tables, choice, strict=True))
        if cost <= budget and (found is None or (total, cost, choice) < found):
            found = (total, cost, choice)
    assert found is not None
    return found[2]


def two_levels(groups, errors, scores, costs, budget):
    between = best(errors, costs, budget)
    result = list(between)
    for group in set(groups):
        rows = [index for index, name in enumerate(groups) if name == group]
        granted = sum(costs[row][between[row]] for row in rows)
        inside = best([scores[row] for row in rows], [costs[row] for row in rows], granted)
        for row, index in zip(rows, inside, strict=True):
            result[row] = index
    return result


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("budget", [4.0, 5.1, 6.0, 7.3, 8.0])
def test_one_width_per_unit_is_the_best_by_both_levels(seed, budget):
    given = problem(seed, budget=budget)
    errors, scores = given.whole_error.tolist(), given.whole_score.tolist()
    wanted = two_levels(given.groups, errors, scores, given.cost.tolist(), given.budget)
    assert constant_widths(given) == [[WIDTHS[index]] * 2 for index in wanted]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [4.5, 6.0])
def test_a_width_for_every_window_is_the_best_by_both_levels(seed, budget):
    groups = GROUPS[:4]
    given = problem(seed, budget=budget, groups=groups)
    steps = [3, 1]
    rows = list(itertools.product(range(len(groups)), range(2)))
    errors, scores = (
        [[float(table[u, b, w]) for b in range(3)] for u, w in rows] for table in (given.output_error, given.score)
    )
    costs = [[float(given.cost[u, b]) * steps[w] for b in range(3)] for u, w in rows]
    wanted = two_levels([groups[u] for u, _ in rows], errors, scores, costs, given.budget * sum(steps))
    found = windowed_widths(given, steps=steps)
    assert [width for row in found for width in row] == [WIDTHS[index] for index in wanted]
    mean = sum(float(given.cost[u, 0]) / 4 * steps[w] * found[u][w] for u, w in rows)
    assert mean <= given.budget * sum(steps)


@pytest.mark.parametrize("seed", range(6))
def test_a_fixed_window_counts_both_sets_of_codes(seed):
    """8 bits in the first window: where the rest has another width the cost is the sum of both."""
    given = problem(seed, budget=12.6)
    found = constant_widths(given, fixed=[8, None])
    assert all(row[0] == 8 for row in found)
    place = {width: index for index, width in enumerate(WIDTHS)}
    options = [[8, width] for width in WIDTHS]
    errors, scores = (
        [
            [sum(float(table[u, place[o[w]], w]) ** (1 / p) for w in range(2)) ** p for o in options]
            for u in range(len(GROUPS))
        ]
        for table, p in ((given.output_error, 2), (given.score, 1))
    )
    costs = [[sum(float(given.cost[u, place[width]]) for width in set(o)) for o in options] for u in range(len(GROUPS))]
    wanted = two_levels(given.groups, errors, scores, costs, given.budget)
    assert found == [options[index] for index in wanted]


@pytest.mark.parametrize("seed", range(6))
def test_a_fixed_window_by_what_runs(seed):
    """8 bits in a window of one step of four, and a width of the unit's own in the other three."""
    given = problem(seed, budget=5.8)
    found = constant_widths(given, fixed=[8, None], steps=[1, 3])
    place = {width: index for index, width in enumerate(WIDTHS)}
    errors, scores = (
        [
            [float(table[u, 2, 0] ** (1 / p) + table[u, place[width], 1] ** (1 / p)) ** p for width in WIDTHS]
            for u in range(len(GROUPS))
        ]
        for table, p in ((given.output_error, 2), (given.score, 1))
    )
    size = (given.cost[:, 0] / 4).tolist()
    costs = [[unit * (8 + 3 * width) for width in WIDTHS] for unit in size]
    wanted = two_levels(given.groups, errors, scores, costs, 4 * given.budget)
    assert found == [[8, WIDTHS[index]] for index in wanted]
    assert len({width for _, width in found}) > 1


def test_two_sets_are_never_worth_their_bytes_where_nothing_is_fixed():
    """8 bits alone cost less than 8 and 4 bits together and lose less: with bytes as the budget, 8 everywhere wins."""
    for budget in (8.0, 12.0, 20.0):  # 12 would pay for 8 and 4 bits of all
        assert constant_widths(problem(0, budget=budget), fixed=[8, None]) == [[8, 8]] * len(GROUPS)


def test_equal_sensitivities_take_the_lower_cost():
    flat = torch.ones(2, 3, 1).double()
    cost = torch.tensor([[4.0, 6.0, 8.0]] * 2)
    given = SideProblem(
        groups=("ffn", "ffn"), widths=WIDTHS, output_error=flat, score=flat, whole_error=flat[..., 0],
        whole_score=flat[..., 0], cost=cost, budget=99,
    )  # fmt: skip
    assert constant_widths(given) == [[4], [4]]


def test_large_models_have_an_answer():
    """92 units (Wan 1.3B) in 4 windows with 4 widths."""
    groups = tuple(["self_attention", "cross_attention", "ffn"] * 30 + ["other"] * 2)
    given = problem(3, budget=5.3, windows=4, widths=(3, 4, 6, 8), groups=groups)
    assert len(constant_widths(given)) == 92
    assert len(windowed_widths(given, steps=[4, 4, 4, 4])) == 92


def test_what_makes_no_sense_is_refused():
    given = problem(0, budget=6.0)
    with pytest.raises(ValueError, match="smallest feasible budget"):
        constant_widths(problem(0, budget=3.9))
    with pytest.raises(ValueError, match="fixed width 5 is no candidate"):
        constant_widths(given, fixed=[5, None])
    with pytest.raises(ValueError, match="3 fixed widths for 2 windows"):
        constant_widths(given, fixed=[8, None, None])
    with pytest.raises(ValueError, match="steps=\\[0, 2\\] must be 2 positive"):
        windowed_widths(given, steps=[0, 2])
    with pytest.raises(ValueError, match="output_error has shape"):
        SideProblem(**{**vars(given), "output_error": given.output_error[:2]})
    with pytest.raises(ValueError, match="whole_error and whole_score"):
        SideProblem(**{**vars(given), "whole_score": given.score})
    with pytest.raises(ValueError, match="whole numbers"):
        SideProblem(**{**vars(given), "cost": given.cost + 0.5})
