"""Blocks that are computed again, with and without their attention: the same bits, attention as often as it should be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qvgen.layers import fused_product
from qvgen.training.blocks.checkpointing import block_checkpoint
from qvgen.training.start.student import prepare_student
from qvgen.verbs._parts import student_design
from qvgen_kernels.cpu_library import missing_reason
from tests.runs import UNSEEN, packed_bytes, shallow, train, train_config

ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu.default"
WAYS = {"everything is kept": None, "all again": False, "attention kept": True}


def student_and_batch() -> tuple[nn.Module, tuple[Tensor, ...]]:
    config = train_config(*shallow(1), "phi.rank=4")
    student, _ = prepare_student(config.model, student_design(config), seed=0)
    draw = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, *config.model.sample_shape, generator=draw)
    place = torch.zeros(2, 6, *config.model.sample_shape[1:])
    captions = torch.randn(2, *config.model.condition_shape, generator=draw)
    return student.train(), (torch.cat((noisy, place), 1), torch.tensor([100.0, 900.0]), captions)


def gradients(student: nn.Module, batch: tuple[Tensor, ...], keep_attention: bool | None) -> list[Tensor]:
    student.zero_grad()
    if keep_attention is not None:
        student.enable_gradient_checkpointing(block_checkpoint(keep_attention=keep_attention))
    output = student(batch[0], timestep=batch[1], encoder_hidden_states=batch[2], return_dict=False)[0]
    output.square().mean().backward()
    return [output.detach(), *(value.grad.clone() for value in student.parameters() if value.grad is not None)]


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of torch, about Wan's norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_the_same(dtype: torch.dtype) -> None:
    student, batch = student_and_batch()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        found = {way: gradients(student, batch, keep) for way, keep in WAYS.items()}
    for way in WAYS:
        assert len(found[way]) > 50
        for one, other in zip(found["everything is kept"], found[way], strict=True):
            assert torch.equal(one, other), way


class Calls(TorchDispatchMode):
    """Counts the operators that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_attention_is_computed_as_often_as_it_is_said() -> None:
    student, batch = student_and_batch()
    counts = {}
    for way, keep in WAYS.items():
        with Calls() as calls:
            gradients(student, batch, keep)
        counts[way] = [calls.counts[name] for name in (ATTENTION, "aten.gelu.default")]
    # Attention to itself and to the text; GELU of the feed-forward, and of captions outside of the block.
    assert counts == {"everything is kept": [2, 2], "all again": [4, 3], "attention kept": [2, 3]}


@pytest.mark.skipif(missing_reason() is not None, reason="no C++ compiler")
def test_fused_operators_run_below_it_and_not_below_who_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    plain = fused_product.is_fused
    monkeypatch.setattr("qvgen.layers.fake_quant_product.is_fused", lambda *args: used.append(plain(*args)) or used[-1])
    student, batch = student_and_batch()
    gradients(student, batch, True)
    assert len(used) == 3 * 10 + 2 * 6  # forward, again, backward of a block; forward and backward of what is outside
    assert all(used)
    used.clear()
    with Calls():
        gradients(student, batch, None)
    assert not any(used)


def test_a_run_packs_the_same_bytes(tmp_path: Path) -> None:
    packed = []
    for keep in ("false", "true"):
        keys = (
            "strategy.gradient_checkpointing=true",
            f"strategy.keep_attention={keep}",
            "steps=2",
            "phi.ranks=[2]",
            *shallow(1),
            *UNSEEN,
        )
        assert train(tmp_path / keep, *keys) == 0
        packed.append(packed_bytes(tmp_path / keep))
    assert packed[0] == packed[1]
