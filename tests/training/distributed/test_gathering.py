"""Ways to gather blocks, by four processes of a small model: the numbers of the model without shares, bit for bit.

test_fsdp.py trains students whose blocks are kept, and whose shares lie on the host, and compares the plan's bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from qvgen.config.build import build
from qvgen.config.schema.strategy import SHARDED_DEFAULTS
from qvgen.errors import UserError
from qvgen.quant.grid import Grid
from qvgen.quantizers.weight_lsq import WeightLSQ
from qvgen.training.distributed.codes_gather import code_bytes, from_bytes, gather_codes_, to_bytes
from qvgen.training.distributed.gathering import Gathering
from qvgen.training.planning.memory import gathered_bytes
from qvgen.training.planning.network import network_parts
from qvgen.verbs._parts import training_run
from tests.parts import planned, planned_student
from tests.runs import composed, train_config
from tests.training.distributed.gathering_program import WAYS

WEIGHTS = 4 * 4 * (8 * 8 + 8), 4 * (4 * 8 + 4)
"""Bytes of the program's blocks and of its head."""


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four processes says of every way."""
    folder = tmp_path_factory.mktemp("gathering")
    command = [sys.executable, str(Path(__file__).with_name("gathering_program.py")), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


def test_all_ways_compute_what_a_whole_model_does(facts: list[dict[str, Any]]) -> None:
    for ways in facts:
        assert ways.keys() == WAYS.keys()
        for name, found in ways.items():
            assert found["same"], name
            assert found["shares"], name


@pytest.mark.parametrize(("way", "backward"), [("again", 3 / 4), ("ahead", 3 / 4), ("kept", 0), ("halves", 1 / 2)])
def test_the_bytes_that_come_to_each_process(facts: list[dict[str, Any]], way: str, backward: float) -> None:
    for ways in facts:
        assert ways[way]["received"] == sum(WEIGHTS) * (3 / 4 + backward)


def test_the_plan_counts_a_backward_pass_among_groups() -> None:
    config = train_config("devices=4", "strategy=fsdp", "strategy.reshard_after_forward=2")
    found = network_parts(training_run(config), planned_student(config)[0], teacher=None)
    parts = {part.name: part.nbytes for part in found}
    assert 3 * parts["student's weights, backward"] == 2 * parts["student's weights, forward"]


def test_the_plan_has_memory_for_what_is_kept() -> None:
    student, _ = planned_student(train_config())
    block = sum(parameter.nbytes for parameter in student.blocks[0].parameters())
    whole = sum(parameter.nbytes for parameter in student.parameters())
    plain = gathered_bytes(student)
    assert gathered_bytes(student, Gathering(prefetch=3)) == plain + 2 * block
    assert gathered_bytes(student, Gathering(reshard_after_forward=2)) == plain + whole // 2
    assert (
        gathered_bytes(student, Gathering(reshard_after_forward=False))
        == plain - 4 * block + whole - (whole - len(student.blocks) * block) + 2 * block
    )
    plan = planned(train_config("devices=2", "strategy=fsdp", "strategy.cpu_offload=true"))
    assert [part.name for part in plan.memory if "student" in part.name] == ["student: buffers"]
    assert {part.name.split(",")[0] for part in plan.host_parts} == {
        "float32 masters", "gradients", "moments", "the teacher's weights"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("devices", "strategy", "key", "message"),
    [
        (2, "ddp", "prefetch=2", r"strategy\.prefetch=2 is of strategies that share .* fsdp"),
        (2, "auto", "cpu_offload=true", r"strategy\.cpu_offload=true is of .* and strategy=auto; leave it out"),
        (4, "fsdp", "reshard_after_forward=3", r"=3 is no group .* the 4 .* write one of 2, or"),
        (2, "fsdp", "reshard_after_forward=2", r"=2 is no group .* the 2 .* write true or false"),
        (2, "fsdp", "reshard_after_forward=some", r"=some is not true or false or a whole number"),
        (2, "ddp", "gather=codes", r"strategy\.gather=codes is of strategies that share"),
        (2, "fsdp", "gather=code", r"strategy\.gather=code is unknown.* \(there are: weights, codes\)"),
        (2, "fsdp", "prefetch=0", r"strategy\.prefetch=0 must be greater than 0"),
    ],
)
def test_what_no_run_can_have_is_refused(devices: int, strategy: str, key: str, message: str) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        train_config(f"devices={devices}", f"strategy={strategy}", f"strategy.{key}")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("granularity", ["per_channel", "per_group"])
@pytest.mark.parametrize("zero_point", ["integer", "real", "none"])
def test_what_is_made_of_codes_has_these_codes(bits: int, granularity: str, zero_point: str) -> None:
    """Also beyond the grid's ends, in rows of zeros, and of scales from the smallest to large ones."""
    grid = Grid(
        bits=bits, granularity=granularity, zero_point=zero_point, group_size=5 if granularity == "per_group" else None
    )
    quantizer = WeightLSQ(out_features=7, in_features=15, grid=grid)
    generator = torch.Generator().manual_seed(bits)
    with torch.no_grad():
        quantizer.scale.copy_(10 ** torch.linspace(-9, 3, quantizer.scale.numel()).reshape(quantizer.scale.shape))
        if quantizer.zero_point is not None:
            quantizer.zero_point.uniform_(-3.0, 2.0**bits + 3.0, generator=generator)
    scale, zero_point_used = quantizer.qparams()
    weight = scale.repeat_interleave(quantizer.columns, dim=1) * torch.randn(7, 15, generator=generator) * 2**bits
    weight[3] = 0.0
    options = {"scale": scale, "zero_point": zero_point_used, "grid": grid}
    part = to_bytes(weight, **options)
    assert part.numel() == code_bytes(bits, weight.numel())
    made = from_bytes(part, **options, columns=15)
    assert torch.equal(quantizer.codes(made), quantizer.codes(weight))
    assert torch.equal(quantizer.fake_quantize(made), quantizer.fake_quantize(weight))


def test_codes_are_refused_where_weights_must_be_kept_or_say_more() -> None:
    two = ("devices=2", "strategy=fsdp", "strategy.gather=codes")
    with pytest.raises(ValueError, match=r"codes and strategy\.reshard_after_forward=false: what is kept"):
        train_config(*two, "strategy.reshard_after_forward=false")
    with pytest.raises(UserError, match=r"strategy\.gather=codes is for methods that train quantized layers"):
        train_config(*two, "method=pretrain")
    with pytest.raises(UserError, match=r"codes and no layer whose weight is what its codes say: adapters"):
        gather_codes_(torch.nn.Linear(2, 2), [])
    run = training_run(train_config(*two, "bits=4"))
    student = planned_student(train_config(*two, "bits=4"))[0]
    parts = {part.name: part.nbytes for part in network_parts(run, student, teacher=None)}
    assert parts["student's weights, forward"] < 0.3 * parts["student's weights, backward"]


def test_a_run_of_an_earlier_version_gathers_as_it_did() -> None:
    plain = deepcopy(composed("devices=2", "strategy=fsdp"))
    for key in (*SHARDED_DEFAULTS, "context_parallel"):
        del plain["strategy"][key]
    strategy = build("train", plain).strategy
    assert (Gathering.of(strategy), strategy.context_parallel) == (Gathering(), 1)
