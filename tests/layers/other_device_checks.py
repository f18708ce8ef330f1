"""Layers on a device that is not the CPU: every tensor is made there, no float64, nothing waits for it; the CPU's values.

The device is the stand-in of tests/stand_in_device.py, on which a tensor left on the CPU is an error. Torch has to know it
before the process's first backward pass, so test_other_device.py runs this file in a process of its own.
"""

import copy

import pytest
import torch

from qvgen.layers.packed_linear import PackedLinear
from qvgen.layers.swap import fold, packed_layers, quantized_layers
from qvgen.lowrank.decay import DecayState
from qvgen_kernels import InputSteps, LinearTensors, fused_op, get_backend
from tests.kernels.cpu_cases import Seeded, draw_case
from tests.kernels.layer import make_layer, make_rows
from tests.layers.model import make_inputs, prepared_model
from tests.profiles import PROFILES, make_profile
from tests.stand_in_device import reading_allowed, register, stand_in_device

register()


DEQUANTIZE = get_backend("dequantize")


def prepacked(layer, device):
    planes = [plane.to(device) for plane in layer.planes]
    zero_point = None if layer.zero_point is None else layer.zero_point.to(device)
    return DEQUANTIZE.prepack(planes, scale=layer.scale.to(device), zero_point=zero_point, spec=layer.spec)


def step(model, optimizer, inputs):
    """One optimizer step; the outputs, and the gradients by name."""
    optimizer.zero_grad()
    y = model(*inputs)
    y.square().mean().backward()
    gradients = {name: value.grad.cpu() for name, value in model.named_parameters() if value.grad is not None}
    optimizer.step()
    return y.detach().cpu(), gradients


def optimizer_of(model):
    return torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-3, foreach=False)


@pytest.mark.parametrize(("name", "phi_rank"), [*((name, 4) for name in PROFILES), ("paper", 0), ("svdq_g64", 0)])
def test_training_steps_are_those_of_the_cpu(name, phi_rank):
    profile = make_profile(name, weight_bits=4, activation_bits=4)
    model = prepared_model(profile, phi_rank=phi_rank).train()
    there, inputs = copy.deepcopy(model), make_inputs()
    expected = [step(model, optimizer, inputs) for optimizer in [optimizer_of(model)] for _ in range(2)]
    with stand_in_device() as device:
        there.to(device)
        moved = [value.to(device) for value in inputs]
        found = [step(there, optimizer, moved) for optimizer in [optimizer_of(there)] for _ in range(2)]
        state = {key: value.cpu() for key, value in there.state_dict().items()}
    for (y, gradients), (wanted, wanted_gradients) in zip(found, expected, strict=True):
        assert torch.equal(y, wanted)
        assert gradients.keys() == wanted_gradients.keys()
        assert all(torch.equal(gradients[key], value) for key, value in wanted_gradients.items())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", PROFILES)
def test_folding_there_gives_the_codes_of_the_cpu_and_packed_layers_run_there(name):
    model = prepared_model(make_profile(name, weight_bits=3, activation_bits=4))
    there, inputs = copy.deepcopy(model), make_inputs()
    fold(model, kernel="dequantize")
    with torch.no_grad():
        expected = model(*inputs)
    with stand_in_device() as device, torch.no_grad():
        there.to(device)
        with reading_allowed():
            fold(there)
            for layer in packed_layers(there).values():
                layer.prepack_()
        y = there(*(value.to(device) for value in inputs))
        assert y.device == device
        assert torch.equal(y.cpu(), expected)
        state = {key: value.cpu() for key, value in there.state_dict().items()}
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert {kernel for layer in packed_layers(there).values() for kernel in layer.kernels} == {"dequantize"}
    errors = [layer.weight_error for layer in packed_layers(model).values()]
    assert [layer.weight_error for layer in packed_layers(there).values()] == errors


def test_phi_decays_there_as_on_the_cpu():
    model = prepared_model(make_profile("paper"), phi_rank=4)
    there = copy.deepcopy(model)
    for layer in quantized_layers(model).values():
        layer.phi.advance_(DecayState(rank=2, gate=(1.0, 0.5), annealed=0.5))
    with stand_in_device() as device:
        there.to(device)
        with reading_allowed():
            for layer in quantized_layers(there).values():
                layer.phi.advance_(DecayState(rank=2, gate=(1.0, 0.5), annealed=0.5))
        state = {key: value.cpu() for key, value in there.state_dict().items()}
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value), key


def test_a_layer_moved_back_runs_on_the_cpu_again():
    model, inputs = prepared_model(make_profile("paper")), make_inputs()
    fold(model)
    with torch.no_grad():
        expected = model(*inputs)
        with stand_in_device() as device, reading_allowed():
            model.to(device)
            model(*(value.to(device) for value in inputs))
            model.to("cpu")
        assert torch.equal(model(*inputs), expected)
    assert all(
        isinstance(layer, PackedLinear) and "dequantize" not in layer.kernels for layer in packed_layers(model).values()
    )


@pytest.mark.parametrize("seed", range(8))
def test_dequantize_gives_the_same_without_float64_and_without_waiting(seed):
    case = draw_case(Seeded(seed), columns=(1, 160), rows=(1, 40), seed=seed)
    layer, expected = (
        case.layer,
        DEQUANTIZE.linear(case.x, prepacked(case.layer, "cpu"), tensors=case.tensors, spec=case.layer.spec),
    )
    with stand_in_device() as device:
        x, *tensors = (None if tensor is None else tensor.to(device) for tensor in (case.x, *case.tensors))
        with reading_allowed():  # checks of values, once, at load
            weight = prepacked(layer, device)
        y = DEQUANTIZE.linear(x, weight, tensors=LinearTensors(*tensors), spec=layer.spec)
        assert y.device == device
        assert torch.equal(y.cpu().nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
def test_steps_before_a_layer_give_the_same_without_waiting(norm):
    layer = make_layer(in_features=40, out_features=9)
    x, gain = make_rows(6, 40, dtype=torch.bfloat16), torch.linspace(-1, 2, 80).view(2, 40)
    row = torch.tensor([0, 1, 1, 0, 0, 1], dtype=torch.int32)
    weight = torch.linspace(0.5, 2, 40) if norm != "none" else None
    before = (gain, gain.flip(0), row, weight, weight)
    steps = InputSteps(norm=norm, eps=1e-6, function="gelu_tanh").to_string()
    spec = layer.spec.to_string()

    def run(x, before, device):
        with reading_allowed():
            planes = prepacked(layer, device)
        return fused_op._fused_linear(x, before, steps, planes, LinearTensors(), spec, "dequantize")

    expected = run(x, before, "cpu")
    with stand_in_device() as device:
        y = run(x.to(device), [None if value is None else value.to(device) for value in before], device)
        assert y.device == device
        assert torch.equal(y.cpu(), expected)
