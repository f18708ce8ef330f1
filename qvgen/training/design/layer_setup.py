"""What quantized layers of a student get besides grids: settings of Phi and gradients, shared quantizers, switched widths."""

from __future__ import annotations

from typing import Literal

from torch import nn

from qvgen.config.schema.sections import ActivationSwitchConfig, PhiConfig
from qvgen.deploy.delta_switch import DeltaSwitchConfig, add_switch
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.shared_input import share_activations_, shared_input_sets
from qvgen.layers.swap import quantized_layers
from qvgen.methods.base import Method
from qvgen.models.base import VideoDiT


def share_inputs_(student: nn.Module, *, family: VideoDiT, method: Method) -> None:
    """Let layers that read the same input share an activation quantizer, if the method says so.

    Args:
        student: Quantized, with its activation widths as they stay.
        family: Says which Linears read the same input.
        method: The training method.
    """
    if method.share_activations:
        share_activations_(quantized_layers(student), input_sets(student, family))


def set_up_phi_(student: nn.Module, phi: PhiConfig) -> None:
    """Tell the Phis of a prepared student how they start and what they act on."""
    for layer in quantized_layers(student).values():
        if layer.phi is not None:
            layer.phi.start = phi.start
            layer.phi.on_input = phi.input == "full"


def input_sets(student: nn.Module, family: VideoDiT) -> tuple[tuple[str, ...], ...]:
    """Names of a student's Linears that read the same input, quantized or not, in sets."""
    linears = (name for name, module in student.named_modules() if isinstance(module, nn.Linear | FakeQuantLinear))
    return shared_input_sets(linears, family.shared_inputs)


def add_configured_switch(student: nn.Module, switch: ActivationSwitchConfig | None) -> None:
    """Let a policy choose a prepared student's activation widths, if there is one."""
    if switch is not None and switch.widths is not None:
        low, high = switch.widths
        add_switch(student, DeltaSwitchConfig(widths=(low, high), delta=switch.delta))


def choose_gradient_path_(student: nn.Module, zero_point_gradient: Literal["through", "stop"]) -> None:
    """Set whether gradients of a prepared student take the path through the zero points of ranges taken at run time."""
    for layer in quantized_layers(student).values():
        layer.through_zero_point = zero_point_gradient == "through"
