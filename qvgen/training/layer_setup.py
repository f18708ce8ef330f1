"""What quantized layers of a student get besides their grids: shared activation quantizers and a switch of widths."""

from __future__ import annotations

from torch import nn

from qvgen.config.schema import TrainConfig
from qvgen.deploy.delta_switch import DeltaSwitchConfig, add_switch
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.shared_input import share_activations_, shared_input_sets
from qvgen.layers.swap import quantized_layers


def share_inputs_(student: nn.Module, config: TrainConfig) -> tuple[tuple[str, ...], ...]:
    """Let layers that read the same input share an activation quantizer, if the method says so.

    Args:
        student: Quantized, with its activation widths as they stay.
        config: The run's.

    Returns:
        Their names, in sets.
    """
    if not config.method.share_activations:
        return ()
    return share_activations_(quantized_layers(student), input_sets(student, config))


def input_sets(student: nn.Module, config: TrainConfig) -> tuple[tuple[str, ...], ...]:
    """Names of a student's Linears that read the same input, quantized or not, in sets."""
    linears = (name for name, module in student.named_modules() if isinstance(module, nn.Linear | FakeQuantLinear))
    return shared_input_sets(linears, config.model.shared_inputs)


def add_configured_switch(student: nn.Module, config: TrainConfig) -> None:
    """Let the configured policy choose a prepared student's activation widths, if there is one."""
    switch = config.activation_switch
    if switch.widths is not None:
        low, high = switch.widths
        add_switch(student, DeltaSwitchConfig(widths=(low, high), delta=switch.delta))
