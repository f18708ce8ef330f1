"""Allocation against all choices in a plain loop, and against scipy's MIP solver where there are too many."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from qvgen.quant import knapsack
from qvgen.quant.knapsack import solve_knapsack
from tests import oracles_ptq

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 4))


@st.composite
def problems(draw, values):
    groups, options = draw(SHAPES)
    rows = st.lists(values, min_size=options, max_size=options)
    table = st.lists(rows, min_size=groups, max_size=groups)
    return draw(table), draw(table)


def total(table, choice):
    return sum(float(row[o]) for row, o in zip(table, choice, strict=True))


def solve(sensitivity, cost, budget):
    to = lambda table: torch.tensor(table, dtype=torch.float64)  # noqa: E731
    return tuple(solve_knapsack(to(sensitivity), to(cost), budget=budget).tolist())


@settings(max_examples=200)
@given(problems(st.integers(0, 6)), st.integers(0, 30))
def test_it_is_the_best_of_all_choices_with_many_ties(problem, budget):
    """Small whole numbers: sums are exact and ties are everywhere. The choice itself is the oracle's."""
    sensitivity, cost = problem
    expected = oracles_ptq.best_allocation(sensitivity, cost, budget)
    if expected is None:
        smallest = float(sum(min(row) for row in cost))
        with pytest.raises(ValueError, match=f"smallest feasible budget is {smallest}"):
            solve(sensitivity, cost, budget)
    else:
        assert solve(sensitivity, cost, budget) == expected[2]


@settings(max_examples=150)
@given(problems(st.floats(0, 1e6)), st.floats(0, 1), st.floats(0, 1))
def test_reals_and_larger_budgets(problem, first, second):
    sensitivity, cost = problem
    low, high = total(cost, [row.index(min(row)) for row in cost]), sum(max(row) for row in cost)
    sums = []
    for share in sorted((0.0, first, second, 1.0)):
        budget = low + share * (high - low)
        choice = solve(sensitivity, cost, budget)
        assert total(cost, choice) <= budget
        sums.append(total(sensitivity, choice))
        assert sums[-1] == oracles_ptq.best_allocation(sensitivity, cost, budget)[0]
    assert sums == sorted(sums, reverse=True)


def test_a_real_size_against_scipy():
    """100 groups of six sizes with 2, 4, 6 or 8 bits. HiGHS stops within 1e-6 of the optimum (its absolute gap)."""
    generator = np.random.default_rng(0)
    size = generator.choice([48, 192, 13, 7, 100, 31], 100).astype(float)
    bits = np.array([2.0, 4.0, 6.0, 8.0])
    cost = size[:, None] * bits
    sensitivity = (
        generator.lognormal(0, 1, (100, 1)) * 2.0 ** (-2 * bits) * generator.uniform(0.7, 1.3, cost.shape) * 100
    )
    one_each = LinearConstraint(np.kron(np.eye(100), np.ones((1, 4))), 1, 1)
    for mean_bits in (2.5, 4.0, 5.7):
        budget = mean_bits * size.sum()
        choice = solve_knapsack(torch.from_numpy(sensitivity), torch.from_numpy(cost), budget=budget)
        assert cost[np.arange(100), choice].sum() <= budget
        within = LinearConstraint(cost.reshape(1, -1), -np.inf, budget)
        found = milp(sensitivity.ravel(), integrality=np.ones(400), bounds=Bounds(0, 1), constraints=[one_each, within],
                     options={"mip_rel_gap": 0})  # fmt: skip
        assert sensitivity[np.arange(100), choice].sum() == pytest.approx(found.fun, abs=2e-6)


def test_disturbing_a_group_that_is_far_from_a_change_changes_no_other():
    sensitivity, cost = [[9, 1], [5, 4], [3, 0]], [[1, 2]] * 3
    assert solve(sensitivity, cost, 4) == (1, 0, 0)
    sensitivity[1] = [5, 4.5]
    assert solve(sensitivity, cost, 4) == (1, 0, 0)


def test_wrong_arguments():
    ones = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"\[2, 3\] and cost \[3\]"):
        solve_knapsack(ones, torch.ones(3), budget=1)
    with pytest.raises(ValueError, match="finite"):
        solve_knapsack(ones * float("nan"), ones, budget=9)
    with pytest.raises(ValueError, match="cost >= 0"):
        solve_knapsack(ones, -ones, budget=9)
    with pytest.raises(ValueError, match="smallest feasible budget is 2.0"):
        solve_knapsack(ones, ones, budget=float("nan"))


def test_what_defeats_the_pruning_is_an_error():
    cost = torch.rand(60, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="merge groups or round the costs"):
        solve_knapsack(1 - cost, cost, budget=float(cost.mean(1).sum()))


def test_too_many_ties_are_refused_before_they_fill_the_memory(monkeypatch):
    tables = [[3.0, 1.0], [3.0, 1.0]], [[1.0, 2.0], [1.0, 2.0]]  # the second group makes four states of two
    monkeypatch.setattr(knapsack, "_MAX_STATES", 4)
    assert solve(*tables, 3) == (0, 1)
    monkeypatch.setattr(knapsack, "_MAX_STATES", 3)
    with pytest.raises(ValueError, match="4 choices of 2 groups tie too closely"):
        solve(*tables, 3)
