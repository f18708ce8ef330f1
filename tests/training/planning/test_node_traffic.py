"""What a step sends between nodes, against formulas of rings that are worked out here, for the size of Wan 14B."""

from __future__ import annotations

import pytest
from torch import nn

from qvgen.training.design.meta_model import build_student, build_teacher
from qvgen.training.design.training_run import TrainingRun
from qvgen.training.loss.prediction_loss import freeze_the_rest_
from qvgen.training.planning.memory import teacher_dtype
from qvgen.training.planning.network import network_parts
from qvgen.training.planning.node_traffic import NodeTraffic, node_traffic
from qvgen.training.planning.text import format_plan
from qvgen.training.planning.training_plan import plan_training
from qvgen.verbs._parts import training_run
from tests.runs import shallow, train_config
from tests.training.planning.test_training_plan import full_size

WEIGHTS, TEACHER = 4 * 14.449e9, 2 * 14.289e9
"""Bytes of float32 masters with Phi and scales, and as many of gradients; of the bfloat16 teacher."""
MICRO_BATCHES = 6


def wan(*words: str) -> TrainingRun:
    return training_run(full_size("wan-14b", "device_memory_gib=80", *words))


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    run = wan("num_nodes=2", "devices=4", "strategy=ddp", f"accumulate={MICRO_BATCHES}")
    student, _ = build_student(run.model.rebuild(), run.design)
    freeze_the_rest_(student, method=run.design.method, optim=run.steps.optim)
    return student, build_teacher(run.model.rebuild(), dtype=teacher_dtype(run.model.family))


@pytest.mark.parametrize(
    ("words", "gathered", "gradients"),
    [
        (("strategy=ddp",), 0, 2 * 7 / 8 * WEIGHTS),
        (("strategy=fsdp",), MICRO_BATCHES * 7 / 8 * (2 * WEIGHTS + TEACHER), MICRO_BATCHES * 7 / 8 * WEIGHTS),
        (("strategy=hsdp",), 0, MICRO_BATCHES * 2 * 1 / 2 * WEIGHTS),
        # Two groups on each node: four hold a whole, and those of one share stand in one ring.
        (("strategy=hsdp", "strategy.shard_size=2"), 0, MICRO_BATCHES * 2 * 3 / 4 * WEIGHTS),
    ],
)
def test_bytes_of_a_step(
    models: tuple[nn.Module, nn.Module], words: tuple[str, ...], gathered: float, gradients: float
) -> None:
    run, (student, teacher) = (
        wan("num_nodes=2", "devices=4", f"accumulate={MICRO_BATCHES}", *words),
        models,
    )
    found = node_traffic(run, network_parts(run, student, teacher=teacher))
    assert found is not None
    assert found.gathered_bytes == pytest.approx(gathered, rel=0.01)
    assert found.gradient_bytes == pytest.approx(gradients, rel=0.01)


def test_a_plan_of_several_nodes_says_bytes_and_time() -> None:
    run = training_run(train_config("num_nodes=2", "devices=2", "strategy=ddp", *shallow(1)))
    plan = plan_training(run, device_memory_gib=80)
    assert isinstance(plan.node_network, NodeTraffic)
    (line,) = (
        line for line in format_plan(plan, title="a run", network_gbits=0.001) if "each of 2 nodes sends" in line
    )
    assert f"; {8 * plan.node_network.nbytes / 1e6:.3g} s a step at 0.001 Gbit/s, " in line
    assert "network_gbits=SPEED" in "\n".join(format_plan(plan, title="a run"))
    alone = training_run(train_config("devices=2", "strategy=ddp", *shallow(1)))
    student, _ = build_student(alone.model.rebuild(), alone.design)
    assert node_traffic(alone, network_parts(alone, student, teacher=None)) is None
