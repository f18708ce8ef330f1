"""The plan: against the real prepared model, the published counts (docs/models.md), files that a run wrote, and itself.

What a plan proposes is planned again: it has to fit, with the bytes that were promised.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qvgen.cli import main
from qvgen.config.build import build
from qvgen.config.compose import compose_plain
from qvgen.config.schema.train import TrainConfig
from qvgen.errors import UserError
from qvgen.layers.swap import quantized_layers
from qvgen.methods.parameter_group import parameter_groups
from qvgen.run_directory import write_plain
from qvgen.training.design.meta_model import build_teacher
from qvgen.training.planning import counted_step
from qvgen.training.planning import deployment as plan_verbs
from qvgen.training.planning.deployment import plan_fold, plan_generate
from qvgen.training.planning.host_memory import preparation_bytes, setup_bytes
from qvgen.training.planning.layer_table import (
    cache_bytes,
    checkpoint_bytes,
    collapse,
    free_bytes,
    packed_bytes,
    state_bytes,
)
from qvgen.training.planning.memory import USABLE_SHARE, MemoryCounter, weight_parts
from qvgen.training.planning.stored_state import StoredState
from qvgen.training.planning.text import format_plan
from qvgen.training.planning.training_plan import TrainingPlan
from qvgen.verbs._parts import named_family, student_design, training_run
from qvgen.verbs.benchmarks.base import cpu_kernel
from tests.models.test_counts import SIZES
from tests.parts import planned, planned_student, prepared
from tests.runs import train_config

CLASSES = ("cogvideox", "wan", "ltx", "latte", "hunyuanvideo", "mochi")
"""A model of each of diffusers' classes. The layers of all are counted in tests/models/test_counts.py."""
LONG = pytest.mark.skipif(
    os.environ.get("QVGEN_LONG_TESTS") != "1", reason="set QVGEN_LONG_TESTS=1 to plan further models of a class"
)
SMALL = (
    "model.num_layers=1", "method=lsq", "batch_size=8",
    "model.include=['*.attn1.to_q','*.attn1.to_k','*.attn2.to_v','*.ffn.net.2']",
)  # fmt: skip
"""A model that is counted quickly, again and again."""


def full_size(model: str, *overrides: str) -> TrainConfig:
    """Configuration of a run with a model of published size."""
    config = build("train", compose_plain("train", [f"model={model}", "logger=csv", *overrides]))
    assert isinstance(config, TrainConfig)
    return config


@pytest.fixture(scope="module")
def tiny_plan() -> TrainingPlan:
    return planned(train_config())


@pytest.fixture(scope="module")
def cogvideox_plan() -> TrainingPlan:
    return planned(full_size("cogvideox", "device_memory_gib=80"), num_clips=16_000)


def test_parameters_are_those_of_the_prepared_student(tiny_plan: TrainingPlan) -> None:
    config = train_config()
    student, swapped = prepared(config)
    wanted = {
        group["name"]: (len(group["params"]), sum(parameter.numel() for parameter in group["params"]))
        for group in parameter_groups(student, config.optim)
    }
    assert {group.name: (group.tensors, group.parameters) for group in tiny_plan.parameters} == wanted
    assert {"weights", "phi", "scales", "clips", "biases_and_norms"} == set(wanted)
    assert tiny_plan.quantized == collapse(student, swapped.quantized)
    assert sum(group.weights for group in tiny_plan.quantized) == sum(
        layer.weight.numel() for layer in quantized_layers(student).values()
    )
    parts = {part.name: part.nbytes for part in tiny_plan.memory}
    assert parts["student: float32 masters"] == sum(parameter.nbytes for parameter in student.parameters())
    assert parts["student: buffers"] == sum(buffer.nbytes for buffer in student.buffers())
    planned, _ = planned_student(config)
    shapes = {name: (value.shape, value.dtype) for name, value in student.state_dict().items()}
    assert {name: (value.shape, value.dtype) for name, value in planned.state_dict().items()} == shapes


def test_the_sum_is_that_of_the_parts(tiny_plan: TrainingPlan) -> None:
    assert tiny_plan.memory_bytes == sum(part.nbytes for part in tiny_plan.memory)
    trained = sum(group.parameters for group in tiny_plan.parameters)
    assert tiny_plan.memory[1].nbytes == 4 * trained
    assert 8 * trained < tiny_plan.memory[2].nbytes < 8.1 * trained
    assert tiny_plan.fits
    assert tiny_plan.needed_bytes is None
    assert tiny_plan.schedule.micro_batch * tiny_plan.schedule.micro_batches == tiny_plan.schedule.batch_size
    assert json.loads(json.dumps(tiny_plan.to_json_dict()))["fits"] is True


def test_phases_are_those_of_the_schedule(tiny_plan: TrainingPlan) -> None:
    assert tiny_plan.schedule.phases == ((4, 0), (2, 3), (1, 6), (0, 10))
    assert "not the model's recipe of 220 steps of 32" in tiny_plan.schedule.recipe
    lines = format_plan(tiny_plan, title="a run")
    assert lines[0] == "plan of a run"
    assert "  rank of Phi: 4 from step 0, 2 from step 3, 1 from step 6, 0 from step 10" in lines


def test_bytes_of_files_are_those_of_a_run(short_run: Path) -> None:
    config = train_config("accumulate=2")
    student, _ = planned_student(config)
    with safe_open(short_run / "packed" / "model.safetensors", "pt") as file:
        assert packed_bytes(student) == sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    with safe_open(short_run / "start.safetensors", "pt") as file:
        assert state_bytes(student) == sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    newest = sorted((short_run / "checkpoints").iterdir())[-1]
    state = torch.load(newest, map_location="cpu", weights_only=True)
    moments = [value for entry in state["optimizer_states"][0]["state"].values() for value in entry.values()]
    assert StoredState().moment_bytes(student) == sum(value.nbytes for value in moments)
    assert checkpoint_bytes(student) < newest.stat().st_size < 1.5 * checkpoint_bytes(student)  # names, small tensors


@pytest.mark.parametrize(
    "name", [name if name in CLASSES else pytest.param(name, marks=LONG) for name in sorted(SIZES)]
)
def test_layers_of_the_published_models(name: str) -> None:
    parameters, linears, blocks, *_ = SIZES[name]
    config = full_size(name)
    student, swapped = planned_student(config)
    groups = collapse(student, swapped.quantized)
    assert sum(group.count for group in groups) + len(swapped.skipped) == linears
    in_blocks = [group for group in groups if "*" in group.pattern and "norm" not in group.pattern]
    assert sum(group.count for group in in_blocks) == blocks
    assert len(groups) < 25
    # weight_parts: 4 + 4 + 8 bytes per trained parameter, the teacher's in its dtype
    teacher = build_teacher(config.model, dtype=torch.bfloat16)
    found = weight_parts(student, teacher=teacher, dtype=torch.bfloat16)
    parts = {part.name.partition(":")[0]: part.nbytes for part in found}
    assert parts["optimizer"] / 8e9 == pytest.approx(parameters, rel=0.05)  # and Phi, scales
    positions = sum(buffer.nbytes for buffer in student.buffers() if buffer.ndim > 1)  # CogVideoX-2b has 0.27 GB
    assert (parts["teacher"] - positions) / 2e9 == pytest.approx(parameters, rel=0.02)


@pytest.mark.parametrize(
    ("name", "shape", "latents", "text"),
    [
        ("cogvideox", (226, 4096), 4 * 16 * 13 * 60 * 90, 2 * 226 * 4096),
        ("wan-14b", (512, 4096), 4 * 16 * 13 * 60 * 104, 2 * 512 * 4096),
    ],
)
def test_bytes_of_the_cache(name: str, shape: tuple[int, int], latents: int, text: int) -> None:
    config = full_size(name)
    assert config.model.condition_shape == shape
    assert cache_bytes(config.data, config.model) == (latents, text)
    half = full_size(name, "model.vae_dtype=bfloat16")
    assert cache_bytes(half.data, half.model) == (latents // 2, text)
    assert cache_bytes(train_config().data, train_config().model) is None
    assert cache_bytes(None, config.model) is None


def test_condition_of_the_tiny_model_is_what_encode_returns() -> None:
    family = train_config().model
    assert family.encode([""])["encoder_hidden_states"].shape[1:] == family.condition_shape


def test_a_full_size_plan(cogvideox_plan: TrainingPlan) -> None:
    """Against the numbers that were estimated by hand before: 41 GB, 0.60 PFLOP, attention 61 % (docs/planning.md)."""
    plan = cogvideox_plan
    count = plan.count
    assert sum(group.count for group in plan.quantized) == 245
    assert plan.precision.startswith("bfloat16")
    assert plan.gradient_checkpointing
    assert plan.schedule.micro_batch == 1
    assert plan.schedule.recipe == "the model's recipe"
    assert 5 * count.student_flops / 1e15 == pytest.approx(0.60, abs=0.005)
    assert count.forward_attention_flops / count.student_flops == pytest.approx(0.61, abs=0.01)
    assert count.teacher_flops == pytest.approx(count.student_flops, rel=0.01)
    assert count.recompute_flops == pytest.approx(count.student_flops, rel=0.01)
    # Attention goes backward with five products for two: the scores are computed again.
    assert count.backward_flops == pytest.approx(2 * count.student_flops + count.forward_attention_flops / 2, rel=0.01)
    assert plan.memory_bytes / 1e9 == pytest.approx(41, abs=2)
    assert plan.fits
    text = "\n".join(format_plan(plan, title="a run"))
    assert "quantized: 245 Linears" in text
    assert "transformer_blocks.*.attn1.to_q      x30  1920x1920" in text
    assert "8.0 epochs of 16000 clips" in text
    assert "that device is not here to be measured" in text


def test_methods_without_teacher_or_quantization() -> None:
    plain = planned(train_config("method=lsq", "model.num_layers=1"))
    assert plain.count.teacher_flops == 0
    assert not any("teacher" in part.name for part in plain.memory)
    assert not any(group.name == "phi" for group in plain.parameters)
    assert plain.schedule.phases == ()
    pretrain = planned(train_config("method=pretrain", "model.num_layers=1"))
    assert pretrain.quantized == []
    assert "quantized: no Linear" in format_plan(pretrain, title="a run")


def test_every_proposal_fits_when_it_is_planned() -> None:
    config = train_config(*SMALL, "device_memory_gib=0.0065")
    plan = planned(config)
    assert not plan.fits
    text = "\n".join(format_plan(plan, title="a run"))
    assert "DOES NOT FIT" in text
    assert "the largest part is activations: kept for the backward pass" in text
    kinds = {change.overrides.partition("=")[0] for change in plan.changes}
    assert {"accumulate", "model.num_frames", "model.image_size"} <= kinds
    for change in plan.changes:
        assert change.total_bytes <= plan.device.usable_bytes < plan.memory_bytes
        assert f"would fit: {change.overrides}" in text
        again = planned(train_config(*SMALL, "device_memory_gib=0.0065", *shlex.split(change.overrides)))
        assert again.fits, change
        assert again.memory_bytes == change.total_bytes


def test_a_model_of_14b_is_shared_out_over_eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against 18 bytes for each of 14.289e9 parameters (docs/models.md) over 8, and what is said in docs/planning.md."""
    # That a third short model adds what the second did is tested in test_live_bytes.py; it would take half of the time.
    monkeypatch.setattr(counted_step, "COUNTED_BLOCKS", (1, 2))
    config = full_size("wan-14b", "device_memory_gib=80")
    whole = planned_student(config)
    counter = MemoryCounter(training_run(config), whole[0])  # the runs below differ in their strategy alone
    plan = planned(config, student=whole, counter=counter)
    assert not plan.fits
    (change,) = plan.changes
    assert change.overrides == "devices=8 strategy=fsdp accumulate=6"
    shared = planned(
        full_size("wan-14b", "device_memory_gib=80", *change.overrides.split()), student=whole, counter=counter
    )
    assert shared.fits
    assert shared.memory_bytes == change.total_bytes
    parts = {part.name: part.nbytes for part in shared.memory}
    shares = sum(nbytes for name, nbytes in parts.items() if "1/8" in name)
    assert shares == pytest.approx(18 * 14.289e9 / 8, rel=0.02)  # and Phi, scales
    block = 8 * 5120**2 + 2 * 5120 * 13824  # two attentions of four Linears, two of the feed-forward layers
    root = 14.289e9 - 40 * block
    assert parts["gathered: a block, its gradients, buffers"] == pytest.approx(4 * (4 * block + 2 * root), rel=0.1)
    # A checkpoint is 12 bytes for each parameter, all shares of one node together, beside rank 0's bfloat16 teacher.
    assert shared.host.needed == pytest.approx(14 * 14.449e9, rel=0.01)
    low = shared.host.otherwise
    assert low is not None
    assert low.needed == pytest.approx(12 * 14.449e9, rel=0.01)  # a checkpoint's copies; no teacher beside them
    assert low.start < 0.2 * shared.host.start
    assert plan.host.needed == pytest.approx(
        6 * 14.4e9 + setup_bytes(whole[0], rank=0, world_size=1, neighbours=1), rel=0.02
    )
    text = "\n".join(format_plan(shared, title="a run"))
    assert "the shares of a checkpoint that is written" in text
    assert "  with strategy.low_host_memory=true: 161.5 GiB, " in text
    assert "student: float32 masters, 1/8" in text
    two_nodes = planned(
        full_size("wan-14b", "device_memory_gib=80", "num_nodes=2", "devices=4", "strategy=fsdp", "accumulate=6"),
        student=whole, counter=counter,
    )  # fmt: skip
    assert two_nodes.memory_bytes == shared.memory_bytes
    assert two_nodes.host.needed == pytest.approx((2 + 12 / 2) * 14.449e9, rel=0.01)


def test_processes_of_a_cpu_share_its_memory_anyway() -> None:
    plan = planned(train_config("model.num_layers=1", "devices=2", "strategy=fsdp"))
    assert plan.shards == 2
    assert not any("fsdp" in change.overrides for change in plan.changes)


def test_where_nothing_fits_it_says_how_much_is_needed() -> None:
    plan = planned(train_config(*SMALL, "device_memory_gib=0.001"))
    assert plan.changes == []
    text = format_plan(plan, title="a run")[-1]
    assert "each device needs 1 GiB" in text
    assert "sharing the model out over 8 GPUs (strategy=fsdp) is not enough either" in text
    hosted = ("optim.offload=true", "strategy.teacher_offload=true", "optim.gradients=bfloat16")
    best = ("strategy.gradient_checkpointing=true", "accumulate=8", "device_memory_gib=1", *hosted)
    assert plan.needed_bytes == int(planned(train_config(*SMALL, *best)).memory_bytes / USABLE_SHARE)


def test_device_memory_must_be_positive() -> None:
    with pytest.raises(UserError, match="device_memory_gib=0.0 must be greater than 0"):
        train_config("device_memory_gib=0")


def test_host_memory_holds_student_while_it_is_swapped() -> None:
    config = train_config()
    student, _ = planned_student(config)
    teacher = build_teacher(named_family(config).rebuild(), dtype=torch.float32)
    weights = sum(value.nbytes for value in teacher.parameters())
    found = preparation_bytes(named_family(config), student_design(config))
    assert found >= state_bytes(student) + weights
    assert found < 1.2 * (state_bytes(student) + weights)


def test_plan_of_fold_and_generate(short_run: Path) -> None:
    run = train_config("accumulate=2")
    how = {"model": named_family(run), "design": student_design(run), "steps": run.steps}
    lines, can_run = plan_fold(short_run, short_run / "packed", **how)
    assert can_run
    student, _ = planned_student(run)
    assert "step-00000012.ckpt" in lines[1]
    assert "36 Linears" in lines[2]
    assert "(what packing the largest layers takes; neither model is held)" in lines[3]
    assert f"{packed_bytes(student) / 1024:.1f} KiB" in lines[4]


def test_a_run_that_was_pretrained_has_nothing_to_fold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = train_config("method=pretrain", "model.num_layers=1", f"run_dir={tmp_path}")
    write_plain(tmp_path / "config.yaml", config.plain)
    for keys in ((), ("dry_run=true",)):
        assert main(["fold", f"run_dir={tmp_path}", *keys]) == 2
        assert "nothing to fold" in capsys.readouterr().err


def test_memory_of_generate(short_run: Path) -> None:
    family = train_config().model
    packed = short_run / "packed"
    lines, can_run = plan_generate(family, packed=[packed])
    assert can_run
    text = "\n".join(lines)
    assert f"{(packed / 'model.safetensors').stat().st_size / 1024:.1f} KiB in 36 packed layers" in text
    assert "VAE and text encoder: none" in text
    assert f"{packed}: kernel=auto on cpu: {cpu_kernel()}" in lines
    assert f"{packed}: kernel=dequantize on cpu: dequantize (about bfloat16's time" in "\n".join(
        plan_generate(family, packed=[packed], kernel="dequantize")[0]
    )
    teacher = family.load_teacher()
    weights = sum(value.nbytes for value in (*teacher.parameters(), *teacher.buffers()))
    assert plan_generate(family, packed=[])[0][0] == f"memory of the transformer: {weights / 1024:.1f} KiB in float32"
    assert "not known without model.path" in plan_generate(full_size("wan").model, packed=[])[0][-1]


def test_a_dry_run_that_does_not_fit_ends_with_3(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    keys = ["dry_run=true", f"run_dir={tmp_path / 'run'}", "logger=csv", *SMALL]
    assert main(["train", *keys]) == 0
    assert main(["train", *keys, "device_memory_gib=0.001"]) == 3
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_host_and_disk_count_where_the_device_is_here(tiny_plan: TrainingPlan) -> None:
    assert tiny_plan.can_run
    assert tiny_plan.run_bytes == sum(
        part.nbytes for part in tiny_plan.disk
    )  # no latent cache: digits are made on the fly
    elsewhere = replace(tiny_plan.device, is_here=False)
    for field, line in (("disk_available_bytes", "DISK IS SHORT"), ("host_available_bytes", "HOST MEMORY IS SHORT")):
        short = replace(tiny_plan, **{field: 1000})
        assert short.fits
        assert not short.can_run
        assert any(text.startswith(line) for text in format_plan(short, title="a run"))
        assert replace(short, device=elsewhere).can_run


def test_free_disk_of_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)


def test_fold_and_generate_say_what_does_not_fit(
    short_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan_verbs, "host_memory", lambda: (2000, 1000))
    assert main(["fold", f"run_dir={short_run}", f"out={tmp_path}", "dry_run=true"]) == 3
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert main(["generate", f"packed={short_run / 'packed'}", "dry_run=true"]) == 3
    assert "1000 B are left on the CPU of this host" in capsys.readouterr().out


def test_a_time_that_nobody_waits_for_is_no_number_of_days(tiny_plan: TrainingPlan) -> None:
    slow = replace(tiny_plan, time=replace(tiny_plan.time, seconds=536329 * 86400.0))
    (line,) = [line for line in format_plan(slow, title="a run") if line.startswith("time")]
    assert "more than a year" in line
    assert "days" not in line
