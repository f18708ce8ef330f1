"""The keys that every training method has, in the one loop that trains all of them: a step of each with all keys changed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from qvgen.config.leaves import leaf_names, load_leaf
from qvgen.evaluation.sampled_teacher import SampledTeacher
from qvgen.layers.swap import fold, packed_layers, quantized_layers
from qvgen.training.module import VideoTraining
from qvgen.training.start.student import set_up_student_
from qvgen.verbs._parts import named_family, ptq_method, student_design
from tests.parts import prepared, training_module
from tests.runs import shallow, train_config
from tests.training.test_module import make_batch, take_steps

METHODS = [name for name in leaf_names("method") if load_leaf("method", name).trains == "student"]
KEYS = (
    "steps=4", "phi.rank=2", "phi.tail_share=0.5", "profile.rotation=16", "optim.learning_rate=1e-3",
    "optim.clip_learning_rate=5e-2", "optim.warmup_share=0", "optim.tail_share=0.5", "optim.tail_rate=0.25",
    "loss.levels=logit_normal", "loss.weighting=min_snr", *shallow(1),
)  # fmt: skip


def started(method: str, *keys: str) -> VideoTraining:
    """A method's module, its student started by the PTQ method and rotated."""
    config = train_config(f"method={method}", *KEYS, *keys)
    student, _ = prepared(config)
    teacher = config.model.load_teacher()
    sampled = SampledTeacher(model=named_family(config), transformer=teacher, encode=config.model.encode, seed=0)
    set_up_student_(student, design=student_design(config), ptq=ptq_method(config), teacher=sampled)
    needed: nn.Module | None = teacher if config.method.needs_teacher else None
    return training_module(config, student=student.train(), teacher=needed, encode=config.model.encode)


def test_all_methods_are_here() -> None:
    assert {"efficientdm", "kd", "lsq", "qdm", "qvgen"} <= set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_takes_every_key(method: str) -> None:
    module = started(method, *(() if method == "lsq" else ("loss.feature_weight=0.5",)))
    layers = quantized_layers(module.student)
    assert {layer.profile.rotation for layer in layers.values()} == {16}
    before = {name: value.detach().clone() for name, value in module.student.named_parameters() if value.requires_grad}
    assert all(map(math.isfinite, take_steps(module, 1)))
    made = module.configure_optimizers()
    optimizer, rates = made["optimizer"], made["lr_scheduler"]["scheduler"]
    peaks = {group["name"]: group["initial_lr"] for group in optimizer.param_groups}
    assert peaks["clips"] == 5e-2
    assert peaks["scales"] == 1e-3
    assert peaks["weights"] == pytest.approx(13.3e-3 if method == "efficientdm" else 1e-3)
    shares = []
    for _ in range(4):
        shares.append({round(group["lr"] / group["initial_lr"], 6) for group in optimizer.param_groups})
        optimizer.step()  # without gradients
        rates.step()
    assert shares == [{1.0}, {0.625}, {0.25}, {0.25}]
    after = dict(module.student.named_parameters())
    changed = {name.rpartition(".")[2] for name, value in before.items() if not torch.equal(value, after[name])}
    assert {"scale", "zero_point", "clip_low", "clip_high"} <= changed
    schedule = module.method.schedule(train_config(f"method={method}", *KEYS).phi, num_steps=4)
    if schedule is not None:
        schedule.apply_(module.student, None, step=4)
    module.method.finish_(module.student)
    fold(module.student)
    assert len(packed_layers(module.student)) == len(layers)


def test_a_method_that_adds_to_layers_starts_in_the_coordinates_of_the_ptq_method() -> None:
    """DVD-Quant rotates whole rows, whatever the profile's rotation."""
    module = started("efficientdm", "init=dvd_quant")
    layers = quantized_layers(module.student)
    assert {layer.profile.rotation for layer in layers.values()} == {layer.in_features for layer in layers.values()}
    assert all(map(math.isfinite, take_steps(module, 1)))


def test_another_draw_weight_or_feature_is_another_loss() -> None:
    """Each option of the loss reaches what is trained; noise and captions are the same with all."""
    first = started("kd")
    (teacher,) = first._teacher
    losses = []
    keys = ("seed=42", "loss.levels=uniform", "loss.weighting=none", "loss.feature_weight=1", "loss.snr_limit=0.01")
    for key in keys:
        module = training_module(
            train_config("method=kd", *KEYS, key), student=first.student, teacher=teacher, encode=first.encode
        )
        losses.append(float(module.loss(module.draw(make_batch(0, 1), step=0)).detach()))
    assert len(set(losses)) == len(losses)
