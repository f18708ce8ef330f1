"""The step-keyed sampler: every property is one of the pure function (seed, step) -> samples, for any cut."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvgen.data.bucket_sampler import BucketBatchSampler


def make_sampler(
    *,
    num_samples: int = 20,
    batch_size: int = 4,
    accumulate: int = 1,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    step: int = 0,
) -> BucketBatchSampler:
    return BucketBatchSampler(
        buckets=[0] * num_samples,
        batch_size=batch_size,
        accumulate=accumulate,
        rank=rank,
        world_size=world_size,
        seed=seed,
        first_step=lambda: step,
    )


@given(
    accumulate=st.integers(1, 3),
    world_size=st.integers(1, 4),
    share=st.integers(1, 3),
    extra=st.integers(0, 9),
    step=st.integers(0, 12),
    seed=st.integers(0, 3),
)
def test_ranks_and_micro_batches_cut_a_step_and_lose_nothing(
    accumulate: int, world_size: int, share: int, extra: int, step: int, seed: int
) -> None:
    batch_size = accumulate * world_size * share
    size = {"num_samples": 2 * batch_size + extra, "batch_size": batch_size, "seed": seed, "step": step}
    whole = make_sampler(**size).step_indices(step)
    assert len(set(whole)) == batch_size
    found = {}
    for rank in range(world_size):
        sampler = make_sampler(**size, accumulate=accumulate, rank=rank, world_size=world_size)
        assert sampler.step_indices(step) == whole
        for micro, indices in enumerate(islice(sampler, accumulate)):
            assert len(indices) == share
            found[micro, rank] = indices
    assert [index for key in sorted(found) for index in found[key]] == whole


@given(first=st.integers(0, 15), seed=st.integers(0, 3))
def test_a_later_start_continues_the_same_sequence(first: int, seed: int) -> None:
    from_start = list(islice(make_sampler(seed=seed, accumulate=2), 2 * 20))
    assert list(islice(make_sampler(seed=seed, accumulate=2, step=first), 2 * 5)) == from_start[2 * first :][: 2 * 5]


def test_an_epoch_shows_every_sample_once_and_epochs_differ() -> None:
    sampler = make_sampler(num_samples=22, batch_size=4)  # 5 steps, 2 samples left out
    epochs = [[index for step in range(5 * n, 5 * n + 5) for index in sampler.step_indices(step)] for n in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == 20
        assert set(epoch) <= set(range(22))
    assert epochs[0] != epochs[1] != epochs[2]
    left_out = set(range(22)) - set(epochs[0])
    assert left_out <= set(epochs[1]) | set(epochs[2])


def test_another_seed_is_another_order() -> None:
    assert make_sampler(seed=0).step_indices(0) != make_sampler(seed=1).step_indices(0)


def test_the_first_step_is_asked_for_when_iteration_begins() -> None:
    steps = iter([3, 1])
    sampler = BucketBatchSampler(
        buckets=[0] * 20, batch_size=4, accumulate=1, rank=0, world_size=1, seed=0, first_step=lambda: next(steps)
    )
    assert next(iter(sampler)) == sampler.step_indices(3)
    assert next(iter(sampler)) == sampler.step_indices(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 21}, "batch_size=21 is larger than the largest bucket of 20 clips"),
        ({"batch_size": 4, "accumulate": 3}, "batch_size=4 can't be divided by accumulate=3 x 1 devices"),
        ({"batch_size": 6, "world_size": 4}, "batch_size=6 can't be divided by accumulate=1 x 4 devices"),
    ],
)
def test_impossible_cuts_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sampler(**options)
