"""The keys of ``phi``: what each makes of the schedule and of a student's layers, against their definitions."""

from __future__ import annotations

import pytest
import torch

from qvgen.config.defaults import load_section
from qvgen.errors import UserError
from qvgen.layers.swap import quantized_layers
from qvgen.methods.phi_decay import PhiDecay, decay_ranks
from tests.layers.model import prepared_model
from tests.parts import planned_student
from tests.profiles import make_profile
from tests.runs import train_config


def test_a_decay_of_zero_keeps_the_whole_rank_and_needs_keep() -> None:
    phi = load_section("phi", rank=24, decay=0, keep=True)
    assert decay_ranks(phi) == (24,)
    decay = PhiDecay.configured(phi, num_steps=10).decay
    assert {decay.at(step).gate for step in range(12)} == {(1.0,) * 24}
    with pytest.raises(UserError, match="phi.decay=0 takes nothing away.*write phi.keep=true too"):
        load_section("phi", rank=24, decay=0)
    assert decay_ranks(load_section("phi", ranks=[8, 2], decay=0)) == (8, 2)  # the list stands in its place


def test_random_columns_go_in_every_layer_and_come_back_from_the_step_alone() -> None:
    models = [prepared_model(make_profile("paper"), phi_rank=4) for _ in range(2)]
    schedule = PhiDecay.configured(load_section("phi", rank=4, drop="random", anneal="step"), num_steps=20)
    for step in range(11):
        schedule.apply_(models[0], None, step=step)
    schedule.apply_(models[1], None, step=10)  # a resumed run begins here
    states = [model.state_dict() for model in models]
    gates = [tuple(value.tolist()) for name, value in states[0].items() if name.endswith("rank_gate")]
    assert {gate[:2] for gate in gates} == {
        (1.0, 0.0),
        (0.0, 1.0),
    }  # in the second half of the second phase; layers differ
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items() if "rank" in name)


@pytest.mark.parametrize("words", [(), ("phi.start=random", "phi.input=full"), ("phi.start=zero", "phi.keep=true")])
def test_every_layer_of_a_student_is_told_how_its_phi_starts_and_acts(words: tuple[str, ...]) -> None:
    config = train_config("model.num_layers=1", *words)
    student, _ = planned_student(config)
    helpers = [layer.phi for layer in quantized_layers(student).values()]
    assert {phi.start for phi in helpers} == {config.phi.start}
    assert {phi.on_input for phi in helpers} == {config.phi.input == "full"}
    assert {phi.keep for phi in helpers} == {config.phi.keep}
