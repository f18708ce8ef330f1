"""Compiled blocks: one graph for all, none for a new rank of Phi, eager measurements, and the run's way through it.

Blocks are traced whole here and then run by torch's own operators (backend ``eager``), with the bits of a run that is not
compiled: the compiler itself is torch's.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from qvgen.cli import main
from qvgen.layers.fused_product import unfused
from qvgen.layers.swap import quantized_layers
from qvgen.training.blocks import compiled as compiled_blocks
from qvgen.training.blocks.compiled import compile_blocks_, release_blocks_, uncompiled
from qvgen.training.start.student import prepare_student
from qvgen.verbs._parts import student_design
from tests.runs import UNSEEN, packed_bytes, shallow, train, train_config

pytestmark = [  # of torch's tracer, about its own ways
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]


KINDS = "model.include=['*.attn1.to_q','*.attn1.to_k','*.ffn.net.2']"
"""Layers with Phi that share their input's quantizer, and one that does not: the more layers, the longer is a trace."""


def student_of(blocks: int) -> nn.Module:
    config = train_config(*shallow(blocks), "phi.rank=4", KINDS)
    return prepare_student(config.model, student_design(config), seed=0)[0].train()


def gradients(student: nn.Module, *, timestep: float = 100.0) -> list[Tensor]:
    student.zero_grad()
    draw = torch.Generator().manual_seed(0)
    video, text = (torch.randn(*shape, generator=draw) for shape in ((1, 9, 8, 16, 16), (1, 3, 64)))
    output = student(video, timestep=torch.tensor([timestep]), encoder_hidden_states=text, return_dict=False)[0]
    output.square().mean().backward()
    return [output.detach(), *(value.grad.clone() for value in student.parameters() if value.grad is not None)]


def test_all_blocks_share_a_graph_and_a_new_rank_makes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(compiled_blocks, "BACKEND", counter)
    student = student_of(2)
    with unfused():
        expected = gradients(student)
    compile_blocks_(student)
    found = gradients(student)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    gradients(student, timestep=900.0)
    for layer in quantized_layers(student).values():
        layer.phi._drop_to(2)
    found = gradients(student)
    assert counter.frame_count == 1
    with uncompiled(student), torch.no_grad():
        gradients_free = student(
            torch.zeros(1, 9, 8, 16, 16), timestep=torch.ones(1), encoder_hidden_states=torch.zeros(1, 3, 64)
        )
    assert gradients_free.sample.isfinite().all()
    assert counter.frame_count == 1
    release_blocks_(student)
    with unfused():
        eager = gradients(student)
    assert all(torch.equal(one, other) for one, other in zip(eager, found, strict=True))
    assert not any("forward" in vars(block) for block in student.blocks)


def test_a_run_goes_through_it_and_packs_the_bytes_of_its_own_arithmetic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(compiled_blocks, "BACKEND", counter)
    packed = []
    for keys in (("strategy.compile=false",), ("strategy.compile=true", "strategy.gradient_checkpointing=true")):
        run_dir = tmp_path / str(len(packed))
        options = ("steps=2", "phi.ranks=[2]", "loss.feature_weight=0.1", *keys, *shallow(1), *UNSEEN, KINDS)
        assert train(run_dir, *options) == 0
        packed.append(packed_bytes(run_dir))
    assert packed[0] == packed[1]
    assert counter.frame_count == 2  # with Phi and without


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["strategy.compile=true", "strategy.keep_attention=true", "strategy.gradient_checkpointing=true"],
            "strategy.keep_attention=true looks at operators one by one",
        ),
        (["strategy.compile=true"], "strategy.compile=true needs a C++ compiler; install g++"),
    ],
)
def test_what_can_not_be_compiled_is_refused_at_once(
    keys: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["train", *keys, "logger=csv", f"run_dir={tmp_path / 'run'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
