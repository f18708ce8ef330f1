"""What a step reaches: seconds, clips and MFU, against numbers that are worked out here, and against a plan's operations."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.distributed import HashStore

from qvgen.config.leaves import load_leaf
from qvgen.training.distributed.pace import FACTOR, STEPS, Pace
from qvgen.training.planning.memory import Device
from qvgen.training.planning.training_plan import plan_training
from qvgen.training.step_figures import Speed, StepFigures, counted_speed, patch_of, speed_of
from qvgen.verbs._parts import training_run
from tests.runs import shallow, train_config


def test_a_step_of_other_clips_has_no_mfu() -> None:
    times = iter(range(100))
    speed = Speed(batch_size=4, devices=1, patch=(1, 1, 2), sample_numel=6, sample_flops=1e12, peak_flops=8e12)
    figures = StepFigures(speed, clock=lambda: float(next(times)))
    assert figures.end() == {}  # none has begun
    rows = []
    for shape in ((2, 1, 1, 2, 3), (2, 1, 1, 2, 4), (2, 1, 1, 3, 2)):
        figures.begin({"video": torch.zeros(shape)})
        rows.append(figures.end())
    assert [row.get("system/mfu") for row in rows] == [0.5, None, 0.5]
    assert [row["system/clips_per_second"] for row in rows] == [4.0, 4.0, 4.0]
    assert [row["system/tokens_per_second"] for row in rows] == [16.0, 16.0, 12.0]  # a last patch is filled up


@pytest.mark.parametrize(("model", "patch"), [("tiny", (1, 4, 4)), ("cogvideox", (1, 2, 2)), ("wan-14b", (1, 2, 2))])
def test_tokens_are_a_models_patches(model: str, patch: tuple[int, int, int]) -> None:
    assert patch_of(load_leaf("model", model)) == patch


def test_operations_are_those_of_the_plan_without_what_is_computed_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run = training_run(train_config(*shallow(2), "strategy.gradient_checkpointing=true"))
    before = torch.random.get_rng_state()
    speed = counted_speed(run, Device(name="one", nbytes=2**40, on_gpu=True, is_here=False), peak=1e15)
    assert torch.equal(torch.random.get_rng_state(), before)
    count, micro_batch = plan_training(run, device_memory_gib=80).count, run.steps.batch.micro_batch_size
    assert count.recompute_flops > 0
    needed = count.teacher_flops + count.student_flops + count.backward_flops
    assert speed.sample_flops == needed / micro_batch
    assert speed.sample_numel == torch.zeros(run.model.family.sample_shape).numel()
    assert speed_of(run, is_first=True).sample_flops is None  # of this machine's CPU
    assert any(text.startswith("system/mfu is left out: no peak speed is known of the CPU") for text in caplog.messages)


def test_the_slow_rank_is_named_once_until_another_is() -> None:
    store = HashStore()
    ranks = [Pace(store, rank=rank, world_size=3) for rank in range(3)]

    def window(*seconds: float) -> list[str]:
        said = []
        for _ in range(STEPS):
            said += [pace.add(own) for pace, own in reversed(list(zip(ranks, seconds, strict=True)))]
        return [text for text in said if text is not None]

    assert window(1.0, 1.1, 1.0) == []
    (first,) = window(1.0, 1.1, 1.1 * FACTOR + 0.1)
    assert "take rank 2 1.75 s and 1.05 s on the others" in first
    assert window(1.0, 1.1, 1.8) == []
    assert window(1.0, 1.1, 1.0) == []
    (second,) = window(3.0, 1.1, 1.0)
    assert "rank 0 3 s" in second
