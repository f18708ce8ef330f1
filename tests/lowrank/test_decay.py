"""The decay of Phi's rank against QVGen's description (Sec. 3.3), step by step."""

import math
from fractions import Fraction

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from qvgen.lowrank.decay import DecaySchedule, halving_ranks


@pytest.mark.parametrize(
    ("rank", "share", "ranks"),
    [
        (32, 0.5, (32, 16, 8, 4, 2, 1)),
        (1, 0.5, (1,)),
        (12, 0.5, (12, 6, 3, 1)),
        (32, 0.25, (32, 24, 18, 13, 9, 6, 4, 3, 2, 1)),
        (32, 0.75, (32, 8, 2)),
        (32, 1.0, (32,)),
        (3, 0.01, (3, 2, 1)),
        (32, 0.0, (32,)),
    ],
)
def test_ranks_of_the_ablations(rank, share, ranks):
    """Half (the paper's lambda) gives 32 16 8 4 2 1; a phase always takes at least one column."""
    assert halving_ranks(rank, decay=share) == ranks


@pytest.mark.parametrize(("rank", "share"), [(10, "0.8"), (5, "0.8"), (10, "0.9"), (90, "0.3")])
def test_decimal_shares_are_the_numbers_that_were_written(rank, share):
    """(1 - 0.8) * 10 is 2, not the 1.9999999999999996 of floating point."""
    kept = math.floor((1 - Fraction(share)) * rank)
    assert halving_ranks(rank, decay=float(share))[:2] == (rank, kept)


@pytest.mark.parametrize("rank", [0, -4])
def test_ranks_that_are_not_positive_are_refused(rank):
    with pytest.raises(ValueError, match=f"phi.rank={rank} is not positive; use 1 or more"):
        halving_ranks(rank, decay=0.5)


@pytest.mark.parametrize("share", [-0.5, 1.5, float("nan")])
def test_shares_outside_are_refused(share):
    with pytest.raises(ValueError, match=rf"phi.decay={share} is outside \[0, 1\]"):
        halving_ranks(8, decay=share)


schedules = st.builds(
    lambda ranks, extra, tail_share, anneal, drop: (ranks, extra, tail_share, anneal, drop),
    st.lists(st.integers(1, 64), min_size=1, max_size=6, unique=True).map(lambda r: tuple(sorted(r, reverse=True))),
    st.integers(0, 90),
    st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9]),
    st.sampled_from(["cosine", "linear", "step"]),
    st.sampled_from(["smallest", "largest", "random"]),
)


@settings(max_examples=60)
@given(schedules)
def test_every_step_of_any_schedule(drawn):
    ranks, extra, tail_share, anneal, drop = drawn
    num_steps = math.ceil(len(ranks) / (1 - tail_share)) + 2 + extra
    plan = DecaySchedule(ranks=ranks, num_steps=num_steps, tail_share=tail_share, anneal=anneal, drop=drop)
    states = [plan.at(step) for step in range(num_steps)]
    assert [plan.at(step) for step in range(num_steps)] == states  # a pure function
    phases = [[s for s in states if s.rank == rank] for rank in (*ranks, 0)]
    assert [s for phase in phases for s in phase] == states  # ranks fall in order, once each
    tail = phases.pop()
    assert all((s.gate, s.annealed) == ((), 0.0) for s in tail)
    assert len(tail) >= tail_share * num_steps - 1e-9
    assert len(tail) < tail_share * num_steps + 1 + 1e-9
    lengths = [len(phase) for phase in phases]
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1
    for phase, kept in zip(phases, (*ranks[1:], 0), strict=True):
        last = len(phase) - 1
        for index, state in enumerate(phase):
            share = index / last if last else 1.0
            shapes = {
                "cosine": (1 + math.cos(math.pi * share)) / 2,
                "linear": 1 - share,
                "step": float(2 * index < last),
            }
            u = shapes[anneal]
            assert state.annealed == pytest.approx(u, abs=1e-15)
            fading = (state.annealed,) * (state.rank - kept)
            if drop == "random":
                assert sorted(state.gate) == sorted((1.0,) * kept + fading)
            else:
                assert state.gate == ((1.0,) * kept + fading if drop == "smallest" else fading + (1.0,) * kept)
        values = [state.annealed for state in phase]
        assert values == sorted(values, reverse=True)
        assert values[-1] == 0.0  # exactly, before the columns are dropped
        assert values[0] == (1.0 if last else 0.0)
    assert plan.at(num_steps + 1000).rank == 0


def test_golden_schedule():
    """12 steps, a tail of 2, phases 4 -> 2 -> gone of 5 steps: u = 1, .854, .5, .146, 0."""
    plan = DecaySchedule(ranks=(4, 2), num_steps=12, tail_share=0.15)
    assert (plan.decay_steps, plan.boundaries) == (10, (0, 5, 10))
    states = [plan.at(step) for step in range(12)]
    assert [state.rank for state in states] == [4] * 5 + [2] * 5 + [0, 0]
    assert [round(state.annealed, 3) for state in states] == [1, 0.854, 0.5, 0.146, 0] * 2 + [0, 0]
    assert states[2].gate == (1.0, 1.0, 0.5, 0.5)
    assert states[7].gate == (0.5, 0.5)
    assert DecaySchedule(ranks=(4,), num_steps=10, tail_share=0.0).at(9).gate == (0.0,) * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": ()}, r"phi.ranks=\[\] must be positive"),
        ({"ranks": (4, 0)}, r"phi.ranks=\[4, 0\] must be positive"),
        ({"ranks": (4, 4)}, r"phi.ranks=\[4, 4\] must fall from each to the next"),
        ({"ranks": (2, 4)}, r"phi.ranks=\[2, 4\] must fall"),
        ({"tail_share": 1.0}, r"phi.tail_share=1.0 is outside \[0, 1\)"),
        ({"tail_share": -0.1}, r"phi.tail_share=-0.1 is outside \[0, 1\)"),
        ({"tail_share": float("nan")}, r"phi.tail_share=nan is outside"),
        ({"anneal": "square"}, "phi.anneal='square' is unknown; use cosine, linear or step"),
        ({"drop": "middle"}, "phi.drop='middle' is unknown; use smallest, largest or random"),
        ({"num_steps": 2}, "steps=2 with phi.tail_share=0.1 leave 1 steps for 2 phases"),
        ({"num_steps": 0}, "steps=0 with"),
    ],
)
def test_bad_schedules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DecaySchedule(**({"ranks": (4, 2), "num_steps": 20, "tail_share": 0.1} | options))


def test_steps_before_the_first_are_refused():
    with pytest.raises(ValueError, match="step=-1 is negative"):
        DecaySchedule(ranks=(4, 2), num_steps=20, tail_share=0.1).at(-1)


def test_random_columns_are_of_the_layer_and_the_phase_alone():
    """The same ones in all steps of a phase and in every process; each column as likely to go as another."""
    plan = DecaySchedule(ranks=(8, 4), num_steps=40, tail_share=0.1, drop="random")
    layers = [f"blocks.{index}.to_q" for index in range(200)]
    gone = {layer: {i for i, gate in enumerate(plan.at(3, layer=layer).gate) if gate < 1} for layer in layers}
    assert all(len(columns) == 4 for columns in gone.values())
    for step in range(1, plan.boundaries[1]):
        for layer in layers[:5]:
            gates = plan.at(step, layer=layer).gate
            assert {i for i, gate in enumerate(gates) if gate < 1} == gone[layer]
    assert sorted(gone["blocks.0.to_q"]) == [2, 3, 4, 5]  # of digests: the same on every machine
    counts = [sum(column in columns for columns in gone.values()) for column in range(8)]
    assert all(70 <= count <= 130 for count in counts)  # 100 expected, 7 the standard deviation
    second = [plan.at(plan.boundaries[1], layer=layer) for layer in layers]
    assert {state.rank for state in second} == {4}
