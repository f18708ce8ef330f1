"""What feature distillation keeps alive: the teacher's outputs of the compared blocks, in a counted step and in a plan."""

from __future__ import annotations

from dataclasses import replace

import torch

from qvgen.config.defaults import load_section
from qvgen.training.planning.counted_step import StepSettings, count_step
from qvgen.verbs._parts import named_family, student_design
from tests.parts import counted, planned
from tests.runs import train_config

BATCH = 2
OUTPUT = BATCH * (8 * 4 * 4) * 64 * 4 + BATCH * 4
"""Bytes of a block's output of the tiny model: samples x tokens x channels in float32; and of its samples' energies."""
SETTINGS = StepSettings(micro_batch=BATCH, gradient_checkpointing=True, autocast=False, teacher_dtype=torch.float32)


def with_features(blocks: tuple[int, ...] | None) -> StepSettings:
    return replace(SETTINGS, loss=load_section("loss", feature_weight=0.5, feature_blocks=blocks))


LAST = with_features((1,))


def test_a_step_keeps_one_output_of_the_teacher_for_each_block() -> None:
    config = train_config("method=kd")
    plain, every, last = (counted(config, settings, blocks=2) for settings in (SETTINGS, with_features(None), LAST))
    assert every.kept_bytes - plain.kept_bytes == 2 * OUTPUT
    assert last.kept_bytes - plain.kept_bytes == OUTPUT


def test_a_block_of_a_deep_model_is_counted_as_in_the_whole_model() -> None:
    """Short models stand in for the whole one, and do not have this block."""
    config = train_config("method=kd", "model.num_layers=4")
    settings = with_features((3,))
    whole = counted(config, settings, blocks=4)
    found = count_step(named_family(config), student_design(config), settings, optim=config.optim, is_checked=False)
    assert replace(found, peak_bytes=0) == replace(whole, peak_bytes=0)
    assert whole.peak_bytes <= found.peak_bytes <= whole.peak_bytes + OUTPUT


def test_a_plan_counts_it() -> None:
    keys = ("method=kd", "batch_size=4", "model.num_layers=1")
    parts = [
        {part.name: part.nbytes for part in planned(train_config(*keys, *more)).memory}
        for more in ((), ("loss.feature_weight=0.1",))
    ]
    more = {name: nbytes - parts[0][name] for name, nbytes in parts[1].items()}
    kept = "activations: kept for the backward pass"
    micro_batch = 2  # of two in a step
    assert more[kept] == OUTPUT * micro_batch // BATCH
    assert not any(nbytes for name, nbytes in more.items() if not name.startswith("activations"))
