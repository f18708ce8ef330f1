"""Live bytes against sums made by hand, and a counted training step on fake tensors against the same step on real ones."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from qvgen.config.build import build
from qvgen.config.compose import compose_plain
from qvgen.training.design.meta_model import build_student, build_teacher, fill_
from qvgen.training.planning.counted_step import StepSettings, count_step, run_step
from qvgen.training.planning.live_bytes import LiveBytes, tensor_bytes
from qvgen.training.planning.operation_counter import OperationCounter
from qvgen.training.planning.shape_operators import ShapeOperators, UnknownResultError
from qvgen.verbs._parts import named_family, student_design
from tests.parts import counted
from tests.runs import train_config

SETTINGS = StepSettings(micro_batch=2, gradient_checkpointing=False, autocast=False, teacher_dtype=torch.float32)
FEW = "model.include=['*.attn1.to_q','*.attn1.to_k','*.attn2.to_v','*.ffn.net.2','*.linear_1','proj_out']"
"""Layers of each kind: of tokens, of text and of a sample; with an input of their own and with a shared one."""
FEW_OF_COGVIDEOX = "model.include=['*.attn1.to_q','*.attn1.to_k','*.ff.net.2','*.linear_1','proj_out']"
AGAIN = {"gradient_checkpointing": True}
KEPT_ATTENTION = {**AGAIN, "keep_attention": True}


def test_a_tensor_counts_as_long_as_it_lives() -> None:
    with LiveBytes() as live:
        kept = torch.ones(100)
        assert live.live == 400
        del kept
        assert live.live == 0
    assert live.peak == 400


def test_a_view_and_an_in_place_result_are_no_new_bytes() -> None:
    with LiveBytes() as live:
        first = torch.ones(100, dtype=torch.bfloat16)
        view = first.view(10, 10)[2:5].mT
        first.add_(1.0).mul_(2.0)
        assert live.live == live.peak == 200
        del first
        assert live.live == 200  # the view holds all of it
        del view
        assert live.live == 0


def test_a_temporary_counts_at_the_peak_alone() -> None:
    with LiveBytes() as live:
        start = torch.ones(100)
        total = (start + 1.0).double().sum()  # 400 + 400, then + 800, then 8 more
    assert live.peak == 400 + 400 + 800  # the first temporary is gone when the sum is made
    assert live.live == 400 + total.nbytes


def test_known_tensors_never_count() -> None:
    weight = nn.Parameter(torch.ones(100))
    weight.grad = torch.zeros(100)
    with LiveBytes([weight, weight.grad]) as live:
        (weight.detach().view(10, 10) * 1.0).sum()
        weight.grad.add_(1.0)
    assert live.peak == 400 + 4


@pytest.mark.parametrize("fake", [False, True])
def test_the_peak_of_a_backward_pass(fake: bool) -> None:
    mode = FakeTensorMode()
    with mode if fake else torch.enable_grad():
        x = torch.ones(100, requires_grad=True)
        x.grad = torch.zeros(100)
        with LiveBytes([x, x.grad]) as live:
            loss = x.exp().exp().sum()
            assert live.live == 400 + 400 + 4  # both exponentials are saved
            live.phase = "backward"
            loss.backward()
            # Loss and its gradient; inside: two saved and one gradient, then one saved and two gradients.
            assert live.phase_peaks["backward"] == 4 + 4 + 3 * 400
            assert live.live == 4
    assert live.peak == 4 + 4 + 3 * 400


def test_bytes_of_tensors_count_each_storage_once() -> None:
    x = torch.ones(10, 10)
    assert tensor_bytes([x, x[2], x.view(-1), torch.ones(3)]) == 400 + 12


@pytest.mark.parametrize("how", [{}, AGAIN, KEPT_ATTENTION])
def test_a_step_without_values_counts_what_a_real_one_does(how: dict[str, bool]) -> None:
    config = train_config("model.num_layers=2", FEW)
    settings = replace(SETTINGS, **how)
    family = named_family(config).rebuild()
    models = [build_student(family, student_design(config))[0], build_teacher(family, dtype=torch.float32)]
    for model in models:
        fill_(model)
        for value in (*model.parameters(), *model.buffers()):
            value.data.zero_()
    gc.collect()
    real = run_step(family, settings, models=models, method=config.method, optim=config.optim)
    assert counted(config, settings, blocks=2) == real
    if how == KEPT_ATTENTION:  # the other ways: as operators without results, by the next test
        assert counted(config, settings, blocks=2, is_fake=True) == real


@pytest.mark.parametrize(
    ("model", "overrides", "gradient_checkpointing", "autocast"),
    [
        ("wan", [FEW, "bits=4"], True, True),
        ("cogvideox", [FEW_OF_COGVIDEOX, "bits=w4a8", "method=lsq"], False, False),
    ],
)
def test_operators_without_results_count_what_fake_tensors_do(
    model: str, overrides: list[str], gradient_checkpointing: bool, autocast: bool
) -> None:
    """At published sizes, where nothing could be computed."""
    config = build("train", compose_plain("train", [f"model={model}", "logger=csv", *overrides]))
    settings = StepSettings(
        micro_batch=1,
        gradient_checkpointing=gradient_checkpointing,
        autocast=autocast,
        teacher_dtype=torch.bfloat16,
    )
    fake = counted(config, settings, blocks=1, is_fake=True)
    assert fake.peak_bytes > 1e9
    assert counted(config, settings, blocks=1) == fake


class _Operators(LiveBytes):
    """Operators that compute nothing, alone."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = ShapeOperators()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.operators(func, args, kwargs)


def test_operators_without_results_return_the_shapes_strides_and_aliases_of_real_ones() -> None:
    def results() -> list[Tensor]:
        image, weight, kernel = torch.empty(2, 6, 8, 5), torch.empty(8, 6), torch.empty(4, 6, 3, 3)
        rows = image.permute(0, 2, 3, 1)
        linear = functional.linear(rows, weight)
        low, high = linear.chunk(2, dim=-1)
        norm, mean, deviation = torch.native_layer_norm(linear, (8,), None, None, 1e-5)
        attended = functional.scaled_dot_product_attention(*[rows.transpose(1, 2)] * 3)
        torch.add(low, high, out=high)
        where = torch.where(low > 0, low, 0.0)
        return [
            rows, linear, low, high, norm, mean, deviation, attended, where, functional.conv2d(image, kernel, padding=1),
            linear.to(torch.bfloat16), linear.amax(-1, keepdim=True), rows.reshape(-1, 6), linear.add_(1.0), low.mT @ low,
            torch.arange(5, dtype=torch.float32), image.new_zeros(3, 2), torch.cat((low, low), dim=1), image.sum().double(),
        ]  # fmt: skip

    def described(tensors: list[Tensor]) -> list[tuple[Any, ...]]:
        storages = [id(tensor.untyped_storage()) for tensor in tensors]
        return [
            (t.shape, t.stride(), t.dtype, t.device, storages.index(s)) for t, s in zip(tensors, storages, strict=True)
        ]

    with _Operators():
        found = results()
    assert described(found) == described(results())


def test_a_mask_picks_all_and_its_complement_nothing() -> None:
    with _Operators():
        tokens, mask = torch.empty(5, 3), torch.empty(2, 5).bool()
        for row in mask:
            assert (tokens[row].shape, tokens[~row].shape) == ((5, 3), (0, 3))
        assert tokens[:, torch.tensor([0, 2])].shape == (5, 2)
        assert torch.all(tokens == 0)  # unknown, and taken to be so


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda x: x.sum().item(), "aten._local_scalar_dense.default returns"),
        (lambda x: torch.equal(x, x), "aten.equal.default returns"),
        (lambda x: x.unique(), "aten._unique2.default"),
        (lambda x: torch.empty(2**60, dtype=torch.int8), "aten.empty"),
    ],
)
def test_what_shapes_do_not_tell_is_refused(operation: Callable[[Tensor], object], message: str) -> None:
    x = torch.zeros(4)
    with _Operators(), pytest.raises(UnknownResultError, match=message):
        operation(x)


def test_what_is_refused_is_counted_on_fake_tensors() -> None:
    """A batch whose largest tensors no host promises: 10^7 samples of 25 kB."""
    config = train_config("model.num_layers=1", "method=lsq", FEW)
    huge = counted(config, replace(SETTINGS, micro_batch=10**7), blocks=1)
    two, three = (counted(config, replace(SETTINGS, micro_batch=size), blocks=1) for size in (2, 3))
    assert huge.student_flops == two.student_flops + (10**7 - 2) * (three.student_flops - two.student_flops)
    assert huge.kept_bytes == two.kept_bytes + (10**7 - 2) * (three.kept_bytes - two.kept_bytes)


def test_activations_grow_linearly_with_the_batch_and_checkpointing_lowers_them() -> None:
    config = train_config("method=lsq")
    # From 2 on: with a single sample some transposed tensors are contiguous as they are, and no copy is made.
    two, three, four = (counted(config, replace(SETTINGS, micro_batch=size), blocks=1) for size in (2, 3, 4))
    assert four.kept_bytes - three.kept_bytes == three.kept_bytes - two.kept_bytes > 0
    assert four.peak_bytes - three.peak_bytes == three.peak_bytes - two.peak_bytes > 0
    assert 2 * two.attention_flops == four.attention_flops
    two = counted(config, SETTINGS, blocks=2)
    checkpointed = counted(config, replace(SETTINGS, gradient_checkpointing=True), blocks=2)
    assert checkpointed.kept_bytes < 0.5 * two.kept_bytes
    assert checkpointed.peak_bytes < two.peak_bytes
    # What is computed again is the blocks' forward pass, up to the last tensor that the backward pass asks for.
    assert 0.8 * two.student_flops < checkpointed.recompute_flops < two.student_flops
    assert checkpointed.backward_flops == two.backward_flops


def test_kept_outputs_of_attention_are_counted_and_its_products_are_not_counted_again() -> None:
    config = train_config("method=lsq")
    checkpointed, kept = (counted(config, replace(SETTINGS, **how), blocks=2) for how in (AGAIN, KEPT_ATTENTION))
    assert checkpointed.recompute_flops - kept.recompute_flops == kept.forward_attention_flops > 0
    assert checkpointed.attention_flops - kept.attention_flops == kept.forward_attention_flops
    # Self- and cross-attention of two blocks: 2 samples of 128 tokens, 64 channels, and the logarithm of each row's sum
    # of 4 heads, all in float32.
    assert kept.kept_bytes - checkpointed.kept_bytes == 2 * 2 * 2 * 128 * (64 + 4) * 4
    same = ("teacher_flops", "student_flops", "backward_flops")
    assert all(getattr(kept, name) == getattr(checkpointed, name) for name in same)


@pytest.mark.parametrize(("how", "is_checked"), [({}, False), (KEPT_ATTENTION, True)])
def test_three_short_models_tell_the_whole_one(how: dict[str, bool], is_checked: bool) -> None:
    config = train_config("model.num_layers=5", "method=lsq", FEW)
    settings = replace(SETTINGS, **how, autocast=True)
    whole = counted(config, settings, blocks=5)
    model, design = named_family(config), student_design(config)
    assert count_step(model, design, settings, optim=config.optim, is_checked=is_checked) == whole


def test_operations_of_linears_are_2mnk() -> None:
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False))
    x = torch.ones(5, 8, requires_grad=True)
    with OperationCounter() as counter:
        loss = model(x).sum()
        counter.enter("backward")
        loss.backward()
    forward = 2 * 5 * 8 * 16 + 2 * 5 * 16 * 4
    assert counter.flops == {"teacher": 0, "student": forward, "recompute": 0, "backward": 2 * forward}


def test_operations_of_a_quantized_layer_and_of_attention() -> None:
    """By hand for tiny with one block and no Phi: self-attention and feed-forward of 128 tokens, 3 words."""
    config = train_config("model.num_layers=1", "method=lsq")
    count = counted(config, replace(SETTINGS, micro_batch=1), blocks=1)
    tokens, width, text = 8 * 4 * 4, 64, 3
    linears = 2 * tokens * width * width * 6 + 2 * text * width * width * 2 + 2 * tokens * width * 128 * 2
    ends = 2 * (width * width * 2 + width * 6 * width) + 2 * text * width * width * 2  # timestep, caption
    ends += 2 * tokens * width * (4 * 4 * 3) + 2 * tokens * width * (4 * 4 * 9)  # output, patches
    attention = 4 * tokens * width * (tokens + text)
    assert count.forward_attention_flops == attention
    assert count.student_flops == linears + ends + attention
    assert count.teacher_flops == 0
