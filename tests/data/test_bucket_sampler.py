"""Batches of one bucket each: a pure function of (seed, step), and with one bucket the plain sampler's."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qvgen.data.bucket_sampler import BucketBatchSampler
from qvgen.data.noise import sample_generator

BUCKETS = ["wide"] * 23 + ["tall"] * 9 + ["square"] * 4


def sampler_of(buckets: list[str] = BUCKETS, **changes: object) -> BucketBatchSampler:
    arguments = {"batch_size": 4, "accumulate": 1, "rank": 0, "world_size": 1, "seed": 0, "first_step": lambda: 0}
    return BucketBatchSampler(buckets=buckets, **arguments | changes)


@given(
    buckets=st.lists(st.sampled_from("abc"), min_size=10, max_size=80),
    batch_size=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_every_batch_is_of_one_bucket_and_an_epoch_repeats_nothing(
    buckets: list[str], batch_size: int, seed: int
) -> None:
    sampler = sampler_of(buckets, batch_size=batch_size, seed=seed)
    counts = Counter(buckets)
    assert sampler.batches_per_epoch == sum(count // batch_size for count in counts.values())
    for epoch in range(2):
        steps = range(epoch * sampler.batches_per_epoch, (epoch + 1) * sampler.batches_per_epoch)
        batches = [sampler.step_indices(step) for step in steps]
        assert all(len(batch) == batch_size and len({buckets[i] for i in batch}) == 1 for batch in batches)
        seen = [index for batch in batches for index in batch]
        assert len(seen) == len(set(seen))
        assert Counter(buckets[batch[0]] for batch in batches) == {
            b: n // batch_size for b, n in counts.items() if n >= batch_size
        }


@pytest.mark.parametrize("seed", [0, 5])
def test_one_bucket_gives_runs_of_each_epochs_permutation(seed: int) -> None:
    sampler = sampler_of(["a"] * 40, batch_size=6, seed=seed)
    for step in (0, 5, 6, 20):
        epoch, index = divmod(step, 6)  # 4 of 40 samples are left out
        order = torch.randperm(40, generator=sample_generator("epoch", seed, epoch)).tolist()
        assert sampler.step_indices(step) == order[6 * index : 6 * index + 6]


def test_ranks_and_micro_batches_share_out_a_step() -> None:
    whole = [sampler_of().step_indices(step) for step in range(20)]
    cuts = [sampler_of(accumulate=2, rank=rank, world_size=2) for rank in range(2)]
    streams = [iter(sampler) for sampler in cuts]
    for batch in whole:
        micro = [next(stream) for _ in range(2) for stream in streams]
        assert [index for part in micro for index in part] == batch


def test_it_can_begin_at_any_step() -> None:
    whole = list(islice(sampler_of(), 30))
    assert list(islice(sampler_of(first_step=lambda: 17), 13)) == whole[17:]
    assert list(islice(sampler_of(seed=1), 30)) != whole


def test_all_clips_come_in_some_epoch_and_buckets_come_mixed() -> None:
    sampler = sampler_of()
    assert {i for step in range(40 * sampler.batches_per_epoch) for i in sampler.step_indices(step)} == set(range(36))
    order = [BUCKETS[sampler.step_indices(step)[0]] for step in range(sampler.batches_per_epoch)]
    assert order != sorted(order)
    assert order != sorted(order, reverse=True)


def test_bad_sizes_are_refused_and_unused_buckets_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="batch_size=24 is larger than the largest bucket of 23 clips"):
        sampler_of(batch_size=24)
    with pytest.raises(ValueError, match="batch_size=4 can't be divided by accumulate=3 x 1"):
        sampler_of(accumulate=3)
    assert not caplog.records
    sampler_of(batch_size=8)
    (message,) = caplog.messages
    assert re.search(r"bucket square .*\b4 clips\b.*\b8\b", message)
