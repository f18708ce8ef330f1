"""The LightningModule on the real tiny model: checked against the formulas of the loss, and for what it may not touch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from qvgen.data.bucket_sampler import BucketBatchSampler
from qvgen.data.moving_digits import MovingDigits, MovingDigitsSource
from qvgen.data.source import Split
from qvgen.training.checkpoint_writer import checkpoints
from qvgen.training.module import VideoTraining
from qvgen.training.optimizer_module import TrainingDivergedError
from qvgen.training.session import load_trained, train_share
from qvgen.verbs._parts import training_output, training_run
from tests.parts import prepared, training_module
from tests.runs import copy_until, load_state, method_schedule, read_metrics, train_config


def make_module(*overrides: str) -> VideoTraining:
    """A module as a run makes it."""
    config = train_config(*overrides)
    teacher = config.model.load_teacher()
    student = prepared(config)[0] if config.method.quantizes else config.model.initial_transformer(0)
    return training_module(
        config,
        student=student.train(),
        teacher=teacher if config.method.needs_teacher else None,
        encode=config.model.encode,
    )


def make_batch(*ids: int) -> dict[str, Any]:
    data = MovingDigits(split="train")
    return default_collate([data[index] for index in ids])


def teacher_of(module: VideoTraining) -> nn.Module:
    (teacher,) = module._teacher
    return teacher


def take_steps(module: VideoTraining, count: int) -> list[float]:
    """Optimizer steps with the module's own optimizer, schedule and clipping."""
    made = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    losses = []
    for step in range(count):
        optimizer.zero_grad()
        loss = module.loss(module.draw(make_batch(3 * step, 3 * step + 1, 3 * step + 2), step=step))
        loss.backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", ["qvgen", "lsq", "pretrain"])
def test_two_steps_reach_the_first_and_the_last_layer(method: str) -> None:
    module = make_module(f"method={method}")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    losses = take_steps(module, 2)
    assert all(torch.tensor(losses).isfinite())
    layers = ["condition_embedder.time_embedder.linear_1", "blocks.0.attn1.to_q", "blocks.2.ffn.net.2", "proj_out"]
    for name, parameter in module.student.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.isfinite().all(), name
        if any(name == f"{layer}.weight" for layer in layers):
            assert parameter.grad.abs().max() > 0
            assert not torch.equal(parameter, before[f"student.{name}"])


def test_the_teacher_is_frozen_and_nowhere_to_be_found() -> None:
    module = make_module()
    teacher = teacher_of(module)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    take_steps(module, 2)
    assert not teacher.training
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    of_teacher = {parameter.data_ptr() for parameter in teacher.parameters()}
    assert not of_teacher & {parameter.data_ptr() for parameter in module.parameters()}
    assert not of_teacher & {value.data_ptr() for value in module.state_dict().values()}
    assert teacher not in list(module.modules())


def test_a_checkpoint_holds_the_student_alone_and_plain_values(short_run: Path) -> None:
    path = checkpoints(short_run / "checkpoints")[-1]
    content = torch.load(path, map_location="cpu", weights_only=True)
    student = make_module().student
    assert list(content["state_dict"]) == [f"student.{name}" for name in student.state_dict()]
    for name, value in student.state_dict().items():
        stored = content["state_dict"][f"student.{name}"]
        assert (stored.shape, stored.dtype) == (value.shape, value.dtype)
    (optimizer,) = content["optimizer_states"]
    assert len(optimizer["state"]) == len(list(student.parameters()))
    weights = sum(parameter.numel() for parameter in student.parameters())
    assert path.stat().st_size < 3.5 * 4 * weights  # weights and two moments, no teacher


@pytest.mark.filterwarnings(
    "ignore:Mismatch dtype between input and weight"
)  # torch's advice on RMSNorm under autocast
def test_under_autocast_masters_and_gradients_stay_float32() -> None:
    module = make_module()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module.loss(module.draw(make_batch(0, 1), step=0))
    loss.backward()
    assert loss.dtype == torch.float32
    for parameter in module.student.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


def test_the_loss_is_the_mean_square_against_its_target() -> None:
    distilled, plain = make_module("method=kd"), make_module("method=lsq")
    draw = plain.draw(make_batch(4, 5), step=7)
    family = plain.family
    condition = family.encode(draw.captions)
    with torch.no_grad():
        student = family.predict(plain.student, draw.noisy, draw.timestep, condition).double()
        teacher = family.predict(teacher_of(distilled), draw.noisy, draw.timestep, condition).double()
        found = float(plain.loss(draw)), float(distilled.loss(draw))
    wanted = float((student - draw.target.double()).square().mean()), float((student - teacher).square().mean())
    assert found == pytest.approx(wanted, rel=1e-5)  # float32 sums of 12288 squares
    assert found[0] != pytest.approx(found[1], rel=1e-3)


def test_what_a_sample_draws_depends_on_seed_step_and_sample_alone() -> None:
    module = make_module("method.caption_dropout=0.5")
    whole = module.draw(make_batch(5, 9, 2, 7), step=3)
    # Micro-batches, processes and batch mates are all cuts of the same samples.
    for part, rows in (((5, 9), slice(0, 2)), ((2,), slice(2, 3)), ((2, 7), slice(2, 4))):
        cut = module.draw(make_batch(*part), step=3)
        assert torch.equal(cut.noisy, whole.noisy[rows])
        assert torch.equal(cut.timestep, whole.timestep[rows])
        assert torch.equal(cut.target, whole.target[rows])
        assert cut.captions == whole.captions[rows]
    again = module.draw(make_batch(5, 9, 2, 7), step=3)
    assert torch.equal(again.noisy, whole.noisy)
    assert again.captions == whole.captions
    other_step = module.draw(make_batch(5, 9, 2, 7), step=4)
    other_seed = make_module("seed=1").draw(make_batch(5, 9, 2, 7), step=3)
    for other in (other_step, other_seed):
        assert not (other.timestep == whole.timestep).any()
        assert not torch.isclose(other.target, whole.target).all(dim=(1, 2, 3, 4)).any()


def test_captions_are_dropped_as_often_as_asked_for() -> None:
    module = make_module("method.caption_dropout=0.25")
    captions = [text for step in range(60) for text in module.draw(make_batch(0, 1, 2, 3, 4), step=step).captions]
    dropped = captions.count("") / len(captions)
    assert dropped == pytest.approx(0.25, abs=0.1)  # four standard deviations of 300 draws
    never = make_module("method.caption_dropout=0").draw(make_batch(0, 1, 2, 3, 4), step=0)
    assert "" not in never.captions


def test_the_loss_of_a_run_is_that_of_its_step(short_run: Path, tmp_path: Path) -> None:
    # Recomputed from the checkpoint before the step, the step's samples in one batch and the step's noise.
    step = 6
    module = make_module("accumulate=2")
    loaded = load_trained(
        module.student, copy_until(short_run, tmp_path / "run", step=step), schedule=method_schedule(train_config())
    )
    assert loaded == step
    sampler = BucketBatchSampler(
        buckets=[0] * 20_000, batch_size=4, accumulate=2, rank=0, world_size=1, seed=module.seed, first_step=lambda: 0
    )
    with torch.no_grad():
        loss = module.loss(module.draw(make_batch(*sampler.step_indices(step)), step=step))
    # Logged is the mean over two micro-batches: the same numbers, summed in another order.
    assert float(loss) == pytest.approx(float(read_metrics(short_run)[step]["train/loss"]), rel=1e-4)
    assert float(loss) != pytest.approx(float(read_metrics(short_run)[step - 1]["train/loss"]), rel=1e-3)


class Broken(MovingDigits):
    """Clips, one of which is not a number."""

    def __init__(self, *, bad: int, **options: Any) -> None:
        super().__init__(**options)
        self.bad = bad

    def __getitem__(self, index: int) -> Any:
        item = super().__getitem__(index)
        return {**item, "video": item["video"] * float("nan")} if index == self.bad else item


@dataclass(frozen=True, kw_only=True)
class BrokenSource(MovingDigitsSource):
    """Such clips as a run opens them."""

    bad: int

    def open(self, family: Any, *, split: str) -> Split:
        opened = super().open(family, split=split)
        return replace(opened, samples=Broken(split=split, length=self.length, bad=self.bad))


def test_a_bad_clip_stops_the_run_and_names_the_step(tmp_path: Path) -> None:
    options = ("method=lsq", "checkpoint.every_steps=1", "checkpoint.keep=1", "batch_size=2", "data.length=40")
    config = train_config(*options)
    sampler = BucketBatchSampler(
        buckets=[0] * 40, batch_size=2, accumulate=2, rank=0, world_size=1, seed=config.seed, first_step=lambda: 0
    )
    (bad, _) = sampler.step_indices(5)
    config = replace(config, data=BrokenSource(bad=bad, **vars(config.data)))
    student, _ = prepared(config)
    with pytest.raises(TrainingDivergedError, match="the loss is nan in optimizer step 5"):
        train_share(training_run(config), training_output(config, tmp_path), student=student, teacher=None)
    # Step 5 has not changed anything, and whether its state was good nobody knows: the one before is proven.
    (kept,) = checkpoints(tmp_path / "checkpoints")
    assert kept.name == "step-00000004.ckpt"
    assert all(value.isfinite().all() for value in load_state(kept).values())
    assert all(parameter.isfinite().all() for parameter in student.parameters())


def test_gradients_that_are_not_finite_stop_the_run() -> None:
    module = make_module("method=lsq")
    optimizer = module.configure_optimizers()["optimizer"]
    module.loss(module.draw(make_batch(0), step=0)).backward()
    module.student.proj_out.weight.grad[0, 0] = float("inf")
    with pytest.raises(TrainingDivergedError, match="the gradient norm is inf in optimizer step 0"):
        module.configure_gradient_clipping(optimizer)


def test_method_and_teacher_have_to_agree() -> None:
    module = make_module()
    with pytest.raises(ValueError, match="needs_teacher=True and a teacher is missing"):
        training_module(train_config(), student=module.student, teacher=None, encode=module.encode)
