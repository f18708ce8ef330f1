"""Planned bytes of what is stored from step to step against torch's own count after a real step, and of full-size models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qvgen.data.noise import NoisyBatch
from qvgen.training.blocks.teacher_offload import OffloadedBlocks
from qvgen.training.callbacks.average import Average
from qvgen.training.design.meta_model import build_teacher
from qvgen.training.optim.optimizer import build_optimizer
from qvgen.training.planning import counted_step
from qvgen.training.planning.memory import USABLE_SHARE, total_bytes, weight_parts
from qvgen.training.planning.stored_state import StoredState
from qvgen.training.planning.text import format_plan
from qvgen.verbs._parts import training_run
from tests.parts import planned, planned_student, prepared, training_module
from tests.runs import shallow, train_config
from tests.training.planning.test_training_plan import full_size

CASES = {
    "float32": (),
    "bfloat16 masters": ("optim.masters=bfloat16", "optim.gradients=bfloat16"),
    "bfloat16 gradients, all else on the host": (
        "optim.gradients=bfloat16", "optim.offload=true", "ema.decay=0.9", "ema.host=true", "strategy.teacher_offload=true",
    ),
    "an average": ("ema.decay=0.9",),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_planned_bytes_are_those_of_a_real_step(case: str) -> None:
    """The plan is allowed 2 %; it is exact."""
    config = train_config(*shallow(1), *CASES[case])
    student, _ = prepared(config)
    teacher = config.model.load_teacher()
    module = training_module(config, student=student.train(), teacher=teacher, encode=config.model.encode)
    if config.strategy.teacher_offload:
        OffloadedBlocks(teacher, torch.device("cpu"))
    optimizer, _ = build_optimizer(module.parameter_groups(), config.optim, num_steps=2)
    clip = torch.randn(2, *config.model.sample_shape)
    module.loss(NoisyBatch(noisy=clip, target=clip, timestep=torch.tensor([1.0, 500.0]), captions=["", ""])).backward()
    optimizer.step()
    moments = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    found = {
        "masters": sum(parameter.nbytes for parameter in student.parameters()),
        "gradients": sum(p.grad.nbytes for p in student.parameters() if p.grad is not None),
        "moments": moments,
    }
    plan = planned(config)
    parts = {part.name: part.nbytes for part in [*plan.memory, *plan.host_parts]}
    for kind, nbytes in found.items():
        (name,) = (name for name in parts if kind in name)
        assert parts[name] == pytest.approx(nbytes, rel=0.02), kind
        assert parts[name] == nbytes, kind
    on_device = {part.name for part in plan.memory}
    assert any("moments" in name for name in on_device) is not config.optim.offload
    assert any("average" in name for name in parts) is (config.ema.decay is not None)
    assert any("average" in name for name in on_device) is (config.ema.decay is not None and not config.ema.host)
    if config.ema.decay is not None:
        (name,) = (name for name in parts if "average" in name)
        average = Average(config.ema, begins=[])
        average.begin(student)
        assert parts[name] == sum(value.nbytes for value in average.tensors.values())
    if config.strategy.teacher_offload:
        blocks = sum(p.nbytes for p in teacher.blocks.parameters())
        assert parts["the teacher's blocks"] == blocks
        text = "\n".join(format_plan(plan, title="a run"))
        assert "host memory while it trains: moments, float32" in text
        assert plan.host.needed >= total_bytes(plan.host_parts)


def test_14b_trains_on_one_gpu_of_141_gb_with_the_student_on_it_and_on_four_of_80(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """49 frames, W4A4; 139 GiB are what a GPU of 141 GB has. The micro-batch is counted once."""
    # That a third short model adds what the second did is tested in test_live_bytes.py; it would take half of the time.
    monkeypatch.setattr(counted_step, "COUNTED_BLOCKS", (1, 2))
    hosted = ("optim.offload=true", "strategy.teacher_offload=true", "optim.gradients=bfloat16")
    config = full_size("wan-14b", "bits=w4a4", "device_memory_gib=139", *hosted)
    prepared_student = planned_student(config)
    student, _ = prepared_student
    plan = planned(config, student=prepared_student)
    assert plan.clip[1] == 13
    assert plan.fits
    parts = {part.name: part.nbytes for part in plan.memory}
    assert parts["student: float32 masters"] == pytest.approx(4 * 14.449e9, rel=0.01)
    assert parts["student: gradients, bfloat16"] == pytest.approx(2 * 14.449e9, rel=0.02)
    assert plan.memory_bytes / 2**30 == pytest.approx(108.7, abs=1)
    kept = {part.name: part.nbytes for part in plan.host_parts}
    assert kept["moments, float32"] == pytest.approx(8 * 14.449e9, rel=0.001)
    assert kept["the teacher's blocks"] == pytest.approx(2 * 40 * (8 * 5120**2 + 2 * 5120 * 13824), rel=0.001)

    teacher = build_teacher(config.model, dtype=torch.bfloat16)
    shared = full_size("wan-14b", "bits=w4a4", "devices=4", "strategy=fsdp", "optim=adamw_8bit")
    four = StoredState.of(training_run(shared), student)
    # Weights have two bytes and two scales to 256, all else (Phi above all) eight.
    assert four.moment_bytes(student) == pytest.approx((2 + 2 * 4 / 256) * 14.285e9 + 8 * 0.164e9, rel=0.01)
    stored = {"teacher": teacher, "dtype": torch.bfloat16, "shards": 4}
    with_it, without = (
        total_bytes(weight_parts(student, **stored, stored=state)) + plan.count.peak_bytes for state in (four, None)
    )
    usable = USABLE_SHARE * 80 * 2**30
    assert with_it <= usable < without
    on_host = replace(StoredState(), moments_on_host=True)
    assert total_bytes(weight_parts(student, **stored, stored=on_host)) + plan.count.peak_bytes < with_it
