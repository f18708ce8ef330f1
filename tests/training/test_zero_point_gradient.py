"""``optim.zero_point_gradient`` reaches every layer and stays there; the formulas are held in tests/quant/test_ste.py."""

import pytest
import torch

from qvgen.layers.fused_product import unfused
from qvgen.layers.swap import forms, quantized_layers, restore_forms_
from qvgen.quant.width_table import WidthTable
from qvgen.run_identity import RunIdentity
from qvgen.training.design.meta_model import build_student
from qvgen.verbs._parts import student_design
from tests.parts import prepared
from tests.runs import train_config

KEYS = ("bits=4", "method=lsq", "steps=20")


@pytest.mark.parametrize("choice", ["through", "stop"])
def test_every_layer_has_the_chosen_path_through_all_that_rebuilds_it(choice):
    config = train_config(*KEYS, f"optim.zero_point_gradient={choice}")
    student, _ = prepared(config)
    planned, _ = build_student(config.model, student_design(config))
    layers = quantized_layers(student)
    restore_forms_(student, forms(student))  # as a resumed run does
    first = next(iter(layers.values()))
    first.move_(profile=first.profile)
    first.set_width_table_(WidthTable(switch=(4, 8)))
    for layer in (*layers.values(), *quantized_layers(planned).values()):
        assert layer.through_zero_point is (choice == "through")


def test_the_choice_changes_gradients_of_clips_and_inputs_and_no_output():
    """Fused and by torch alone: both have the same bits, and the choice decides them."""
    torch.manual_seed(0)
    config = train_config(*KEYS)
    layer = next(iter(quantized_layers(prepared(config)[0]).values()))
    x, grad = torch.randn(1, 7, layer.in_features), torch.randn(1, 7, layer.out_features)
    layer.noise_band.set_timestep(torch.tensor([500.0]))
    layer.activation_quantizer.start_from_(0.6, 0.6)  # codes that are clamped are what moves a zero point
    found = {}
    for through in (True, False):
        layer.through_zero_point = through
        for fused in (True, False):
            inputs = x.clone().requires_grad_()
            layer.zero_grad(set_to_none=True)
            if fused:
                y = layer(inputs)
                y.backward(grad)
            else:
                with unfused():
                    y = layer(inputs)
                    y.backward(grad)
            gradients = inputs.grad, layer.activation_quantizer.clip_low.grad, layer.weight.grad
            found[through, fused] = (y.detach(), *gradients)
        assert all(map(torch.equal, found[through, True], found[through, False]))
    y, of_x, of_clip, of_weight = map(torch.equal, found[True, True], found[False, True])
    assert (y, of_x, of_clip, of_weight) == (True, False, False, True)


def test_another_choice_is_another_run():
    keys = [
        RunIdentity.begin(train_config(*KEYS, f"optim.zero_point_gradient={choice}").plain, {}, commit=None).run
        for choice in ("through", "stop", "stop")
    ]
    assert keys[0] != keys[1] == keys[2]
