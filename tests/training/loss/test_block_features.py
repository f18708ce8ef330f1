"""Feature distillation on the real tiny model: its formula in float64, its gradient by finite differences, checkpointing.

Compiled blocks are in test_compiled_blocks.py; DDP, FSDP and a run that is continued in distributed/test_whole_runs.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qvgen.config.defaults import load_section
from qvgen.data.noise import NoisyBatch
from qvgen.errors import UserError
from qvgen.models.base import VideoDiT
from qvgen.training.blocks.checkpointing import block_checkpoint
from qvgen.training.distributed.sharding import blocks_of
from qvgen.training.loss.block_features import compared_outputs, feature_loss
from qvgen.training.loss.prediction_loss import prediction_loss
from qvgen.training.start.student import prepare_student
from qvgen.verbs._parts import student_design
from tests.models.hub_folders import make_cogvideox_folder
from tests.runs import shallow, train_config
from tests.verbs.test_hub_models import tiny_keys

CONFIG = ("phi.rank=4", *shallow(2))
ALL = {"feature_weight": 0.25}


def inputs(family: VideoDiT, *, dtype: torch.dtype = torch.float32) -> tuple[NoisyBatch, dict[str, Tensor]]:
    made = torch.Generator().manual_seed(0)
    noisy, target = (torch.randn(2, *family.sample_shape, generator=made).to(dtype) for _ in range(2))
    condition = {"encoder_hidden_states": torch.randn(2, *family.condition_shape, generator=made).to(dtype)}
    return NoisyBatch(noisy=noisy, timestep=torch.tensor([300.0, 800.0]), target=target, captions=[]), condition


def loss_of(family: VideoDiT, student: nn.Module, teacher: nn.Module, **options: object) -> Tensor:
    draw, condition = inputs(family, dtype=next(student.parameters()).dtype)
    loss = load_section("loss", **options)
    method = train_config("method=kd").method
    return prediction_loss(family, student, draw, condition, method=method, teacher=teacher, options=loss)


def outputs_of(family: VideoDiT, model: nn.Module) -> list[Tensor]:
    """What the blocks hand on, by the forward of each replaced, and no hook."""
    found: list[Tensor] = []

    def kept(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: object, **kwargs: object) -> Tensor:
            found.append(result := forward(*args, **kwargs))
            return result

        return run

    for block in blocks_of(model):
        block.forward = kept(block.forward)
    draw, condition = inputs(family)
    with torch.no_grad():
        family.predict(model, draw.noisy, draw.timestep, condition)
    for block in blocks_of(model):
        del block.forward
    return found


def models() -> tuple[VideoDiT, nn.Module, nn.Module]:
    config = train_config(*CONFIG)
    student, _ = prepare_student(config.model, student_design(config), seed=0)
    return config.model, student.train(), config.model.load_teacher()


@pytest.mark.parametrize("blocks", [None, (1,), (1, 0)], ids=str)
def test_the_term_is_the_mean_relative_error_of_the_chosen_blocks(blocks: tuple[int, ...] | None) -> None:
    family, student, teacher = models()
    loss = loss_of(family, student, teacher, **ALL, feature_blocks=blocks)
    errors = []
    for number, (mine, wanted) in enumerate(zip(outputs_of(family, student), outputs_of(family, teacher), strict=True)):
        if blocks is None or number in blocks:
            apart, energy = (value.double().square().sum((1, 2)) for value in (mine.double() - wanted, wanted))
            errors.append((apart / energy).mean())
    plain = loss_of(family, student, teacher)
    assert float(torch.stack(errors).mean()) > 0.001
    added = float((loss - plain).detach())
    assert added == pytest.approx(0.25 * float(torch.stack(errors).mean()), rel=1e-4)  # float32 losses of about 1
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_gradient_is_that_of_finite_differences() -> None:
    """Of a real block in float64, unquantized: rounding has no slope."""
    config = train_config("method=kd", *shallow(1))
    family = config.model
    teacher = family.load_teacher().double()
    student = family.load_teacher().double().requires_grad_(True)
    made = torch.Generator().manual_seed(1)
    away = {name: torch.randn(p.shape, generator=made).double() * p.std() for name, p in student.named_parameters()}

    def moved(share: float) -> Tensor:
        with torch.no_grad():
            for (name, parameter), start in zip(student.named_parameters(), teacher.parameters(), strict=True):
                parameter.copy_(start + share * away[name])
        return loss_of(family, student, teacher, feature_weight=3.0) - loss_of(family, student, teacher)

    loss = moved(0.1)
    assert loss.dtype == torch.float64
    slopes = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
    found = sum(
        float((slope * away[name]).sum().detach())
        for (name, _), slope in zip(student.named_parameters(), slopes, strict=True)
        if slope is not None
    )
    step = 1e-3  # the class computes norms and residuals in float32, whose noise a smaller step would show
    difference = float((moved(0.1 + step) - moved(0.1 - step)).detach()) / (2 * step)
    assert abs(difference) > 0.1
    assert found == pytest.approx(difference, rel=1e-4)
    h, w = (torch.randn(2, 3, 4, generator=made, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda value: feature_loss([value, value.square()], [w, w]), h.requires_grad_())


def gradients(family: VideoDiT, student: nn.Module, teacher: nn.Module) -> list[Tensor]:
    student.zero_grad()
    loss = loss_of(family, student, teacher, **ALL)
    loss.backward()
    return [loss.detach(), *(value.grad.clone() for value in student.parameters() if value.grad is not None)]


@pytest.mark.parametrize("keep_attention", [False, True])
def test_blocks_that_are_computed_again_give_the_same_bits(keep_attention: bool) -> None:
    family, student, teacher = models()
    expected = gradients(family, student, teacher)
    student.enable_gradient_checkpointing(block_checkpoint(keep_attention=keep_attention))
    found = gradients(family, student, teacher)
    assert all(map(torch.equal, expected, found))
    assert not any(block._forward_hooks for model in (student, teacher) for block in blocks_of(model))


def test_what_a_cogvideox_block_hands_on_of_the_video_is_compared(tmp_path: object) -> None:
    """Its blocks return video and text; the text of the last one is used by nothing."""
    folder = make_cogvideox_folder(tmp_path / "2b", "2b")
    family = train_config(*tiny_keys("cogvideox", folder), f"data.path={tmp_path}").model
    model = family.load_teacher(dtype=torch.float32).requires_grad_(True)
    draw, condition = inputs(family)
    with compared_outputs(model, load_section("loss", **ALL)) as found:
        family.predict(model, draw.noisy, draw.timestep, condition)
    tokens = draw.noisy[0, 0].numel() // family.patch_size**2
    assert [value.shape[:2] for value in found] == [(2, tokens)] * len(blocks_of(model))
    feature_loss(found, [value.detach() + 1 for value in found]).backward()
    assert model.transformer_blocks[0].ff.net[2].weight.grad.abs().max() > 0


def test_a_block_that_puts_out_nothing_gives_finite_gradients() -> None:
    h = torch.ones(2, 3, 4, requires_grad=True)
    feature_loss([h], [torch.zeros(2, 3, 4)]).backward()
    assert h.grad.isfinite().all()


def test_bad_blocks_are_refused_in_one_line() -> None:
    family, student, teacher = models()
    with pytest.raises(
        UserError, match=r"loss.feature_blocks holds 2, and the model has 2 blocks; write numbers of 0..1"
    ):
        loss_of(family, student, teacher, **ALL, feature_blocks=[0, 2])
    for blocks in ([], [-1], [0, 0]):
        with pytest.raises(UserError, match=r"loss.feature_blocks=\[.*\] must be different numbers from 0 on"):
            load_section("loss", **ALL, feature_blocks=blocks)
    with pytest.raises(UserError, match="loss.feature_blocks says nothing with loss.feature_weight=0"):
        load_section("loss", feature_blocks=[0])
    with compared_outputs(nn.Linear(2, 2), load_section("loss")) as found:
        assert found == []
    with (
        pytest.raises(UserError, match="this model has no list of blocks"),
        compared_outputs(nn.Linear(2, 2), load_section("loss", **ALL)),
    ):
        pass
