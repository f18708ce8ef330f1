"""Training with attention in 8 bits: gradients reach everything, and what is computed again has the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qvgen.deploy.checkpoint import load_packed
from qvgen.layers.attention_swap import packed_attentions, quantized_attentions
from qvgen.layers.swap import folded_copy
from qvgen.methods.parameter_group import parameter_groups
from qvgen.training.planning.operation_counter import OperationCounter
from qvgen.training.start.student import prepare_student
from qvgen.verbs._parts import student_design
from tests.runs import UNSEEN, shallow, train, train_config
from tests.training.blocks.test_block_checkpoint import WAYS, Calls, gradients

KEYS = ("profile.attention={kind:int8,clips:true}",)
SCORES_ALONE = ("profile.attention={kind:int8_qk,clips:true}",)


def student_and_batch(*keys: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    config = train_config(*shallow(1), "phi.rank=4", *keys)
    student, _ = prepare_student(config.model, student_design(config), seed=0)
    draw = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, *config.model.sample_shape, generator=draw)
    place = torch.zeros(2, 6, *config.model.sample_shape[1:])
    captions = torch.randn(2, *config.model.condition_shape, generator=draw)
    return student.train(), (torch.cat((noisy, place), 1), torch.tensor([100.0, 900.0]), captions)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of torch, about Wan's norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_that_are_computed_again_have_the_same_bits(dtype: torch.dtype) -> None:
    student, batch = student_and_batch(*KEYS)
    counts = {}
    found = {}
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        for way, keep in WAYS.items():
            with Calls() as calls:
                found[way] = gradients(student, batch, keep)
            counts[way] = calls.counts["qvgen.attention.default"]
    assert counts == {"everything is kept": 2, "all again": 4, "attention kept": 2}
    for way in WAYS:
        for one, other in zip(found["everything is kept"], found[way], strict=True):
            assert torch.equal(one, other), way
    for product in quantized_attentions(student).values():
        for logits in product.parameters():
            assert logits.grad is not None
            assert logits.grad.isfinite().all()
            assert logits.grad[[5, 45]].ne(0).any(1).all()  # the bands of both samples
            assert logits.grad.ne(0).any(1).sum() == 2


def test_factors_are_trained_with_the_other_clips() -> None:
    config = train_config(*shallow(1), *KEYS)
    student, _ = prepare_student(config.model, student_design(config), seed=0)
    clips = next(group for group in parameter_groups(student, config.optim) if group["name"] == "clips")
    ours = [logits for product in quantized_attentions(student).values() for logits in product.parameters()]
    assert len(ours) == 4
    assert {id(logits) for logits in ours} <= {id(parameter) for parameter in clips["params"]}
    assert (clips["lr"], clips["weight_decay"]) == (config.optim.clip_learning_rate, 0.0)


@pytest.mark.parametrize("keys", [KEYS, SCORES_ALONE])
def test_a_step_changes_the_factors_and_fold_keeps_their_bits(keys: tuple[str, ...]) -> None:
    student, batch = student_and_batch(*keys, "method=lsq")
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    gradients(student, batch, None)
    optimizer.step()
    student.eval()
    inputs = {"timestep": batch[1], "encoder_hidden_states": batch[2], "return_dict": False}
    with torch.no_grad():
        trained = student(batch[0], **inputs)[0]
        packed = folded_copy(student)
        assert torch.equal(packed(batch[0], **inputs)[0], trained)
    for product in packed_attentions(packed).values():
        tables = product.tables()
        assert tables is not None
        assert not any(bool((table[[5, 45]] == 1).all()) for table in tables)


def test_a_run_packs_what_was_trained(tmp_path: Path) -> None:
    keys = ("steps=4", "phi.ranks=[2]", *shallow(1), *UNSEEN, *KEYS)
    assert train(tmp_path / "run", *keys) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["attentions_quantized"] == ["blocks.0.attn1", "blocks.0.attn2"]
    assert (report["packed_codes_equal"], report["packed_vs_fake_max_abs"]) == (True, 0.0)
    assert list(packed_attentions(load_packed(tmp_path / "run" / "packed"))) == report["attentions_quantized"]


def test_its_products_are_counted_as_many_as_torchs() -> None:
    counts = []
    for keys in ((), KEYS):
        student, batch = student_and_batch(*keys)
        with OperationCounter() as counter:
            output = student(batch[0], timestep=batch[1], encoder_hidden_states=batch[2], return_dict=False)[0]
            counter.enter("backward")
            output.square().mean().backward()
        counts.append((counter.flops, counter.attention_flops))
    assert counts[0] == counts[1]
    assert counts[0][1]["backward"] == 2.5 * counts[0][1]["student"] > 0
