"""Whether exported tensors are the packed model: every layer, and the whole model, on the same inputs.

    layer    the packed layer's own inputs in one call of the packed model -> the target's arithmetic on the exported tensors
    whole    the same call, all layers by the target's arithmetic, all other weights as exported

    error = |y - y_packed|^2 / |y_packed|^2, in float32 with the exact reference kernel; 0 only where all values are equal

Where biases and other weights are rounded to the target's precision, layers are compared with a packed model whose own were
rounded alike: what a target's arithmetic changes and what that rounding changes are two numbers.

The packed model is the fake-quantized one of the training (the fold and every load are held to its codes). Classes without
fixed inputs (:mod:`qvgen.deploy.fixed_inputs`) are compared layer by layer on normal inputs with one loud channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from qvgen.deploy.exported_model import PackedSource, open_packed
from qvgen.deploy.exporters.base import ExportedModel, Exporter, Fit, HalfSums, cast
from qvgen.deploy.fixed_inputs import SEED, call_fixed, fixed_inputs
from qvgen.deploy.memory_return import return_freed_memory
from qvgen.layers.layer_input import entered_input
from qvgen.layers.packed_linear import PackedLinear

TIMESTEP = 500.0
WATCHED_ROWS = 128
"""Rows of a layer's input that are compared, at most."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a tensor is from another one.

    Attributes:
        error: Relative squared error.
        max_abs: Largest difference of a value.
    """

    error: float
    max_abs: float

    @classmethod
    def of(cls, y: Tensor, wanted: Tensor) -> Self:
        """The difference of a tensor from the wanted one, of any shape."""
        difference = (y - wanted).double()
        error = difference.square().sum() / wanted.double().square().sum().clamp(min=1e-30)
        return cls(error=float(error), max_abs=float(difference.abs().max()))


@dataclass(frozen=True, kw_only=True)
class LayerParity:
    """One layer.

    Attributes:
        name: Its name in diffusers' transformer.
        trained: Its bits in training, for example ``w3a3``.
        fit: How the target carries it.
        output: Error of its output.
        half_sums: The same with the kernels' sums in half precision; None for a target without.
    """

    name: str
    trained: str
    fit: Fit
    output: Difference
    half_sums: Difference | None


@dataclass(frozen=True, kw_only=True)
class Parity:
    """A whole comparison.

    Attributes:
        layers: One entry for each packed layer.
        model: Error of the whole model's output as it is exported; None where its class has no fixed inputs.
        arithmetic: The part of it that is not the rounding of biases and other weights; None likewise.
        half_sums: That part with the kernels' sums in half precision; None likewise, and for a target without.
    """

    layers: tuple[LayerParity, ...]
    model: Difference | None
    arithmetic: Difference | None
    half_sums: Difference | None

    @property
    def exact(self) -> bool:
        """Whether every output is equal to the packed model's, but for the rounding of biases and other weights."""
        whole = self.arithmetic is None or self.arithmetic.max_abs == 0
        return whole and all(layer.output.max_abs == 0 for layer in self.layers)


class ExportedLinear(nn.Module):
    """A layer that computes what the target's runtime computes, in float32."""

    def __init__(
        self, exporter: Exporter, tensors: Mapping[str, Tensor], *, out_features: int, half_sums: bool = False
    ) -> None:
        super().__init__()
        self.tensors, self.out_features = tensors, out_features
        assert isinstance(exporter, HalfSums) or not half_sums
        self.output = exporter.half_output if isinstance(exporter, HalfSums) and half_sums else exporter.output
        # Transformers of diffusers ask some layers for the dtype of their first parameter.
        self.float32 = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x [..., K]."""
        y = self.output(self.tensors, x.float().flatten(0, -2))[:, : self.out_features]
        return_freed_memory(freed_bytes=4 * x.shape[-1] * self.out_features)
        return y.unflatten(0, x.shape[:-1]).to(x.dtype)


@torch.no_grad()
def compare(source: PackedSource, model: ExportedModel, *, exporter: Exporter, fits: Mapping[str, Fit]) -> Parity:
    """Compare an export with its source, on the CPU in float32. Afterwards the source's other weights are rounded too."""
    timesteps = source.manifest.timesteps
    timestep = TIMESTEP if timesteps is None else timesteps[0]
    inputs = fixed_inputs(source.model.float(), timestep=timestep)
    _prepare_one_by_one_(source)
    original = None if inputs is None else call_fixed(source.model, inputs)
    _round_rest_(source, exporter)
    seen, rounded = _watch(source, timestep) if inputs is None else _call_watched(source, inputs)
    linears, half = (
        {
            name: ExportedLinear(exporter, model.layers[name], out_features=layer.out_features, half_sums=half_sums)
            for name, layer in source.layers.items()
        }
        for half_sums in (False, isinstance(exporter, HalfSums))
    )
    has_half = isinstance(exporter, HalfSums)
    layers = tuple(
        _layer_parity(name, seen[name], layer, linears[name], half[name] if has_half else None, fits[name])
        for name, layer in source.layers.items()
    )
    if inputs is None or original is None or rounded is None:
        return Parity(layers=layers, model=None, arithmetic=None, half_sums=None)

    def exported(own: Mapping[str, ExportedLinear]) -> Tensor:
        return call_fixed(_exported_transformer(source, model, own), inputs)

    output = exported(linears)
    return Parity(
        layers=layers,
        model=Difference.of(output, original),
        arithmetic=Difference.of(output, rounded),
        half_sums=Difference.of(exported(half), rounded) if has_half else None,
    )


@torch.no_grad()
def compare_packed(source: PackedSource, written: PackedSource, *, fits: Mapping[str, Fit]) -> Parity:
    """Compare a packed model with its source, both on the CPU in float32 with the exact reference kernel."""
    timesteps = source.manifest.timesteps
    timestep = TIMESTEP if timesteps is None else timesteps[0]
    for each in (source, written):
        each.model.float()
        _prepare_one_by_one_(each)
    inputs = fixed_inputs(source.model, timestep=timestep)
    seen, original = _watch(source, timestep) if inputs is None else _call_watched(source, inputs)
    if inputs is None:
        _watch(written, timestep)
        whole = None
    else:
        output = call_fixed(written.model, inputs)
        assert original is not None, "the output of the call that was watched"
        whole = Difference.of(output, original)
    others = written.layers
    layers = tuple(
        _layer_parity(name, seen[name], layer, others[name], None, fits[name]) for name, layer in source.layers.items()
    )
    return Parity(layers=layers, model=whole, arithmetic=whole, half_sums=None)


def _prepare_one_by_one_(source: PackedSource) -> None:
    """Let each layer forget after a call what the kernel prepared for it: all of them together are as large as the model."""

    def forget(layer: nn.Module, *_: object) -> None:
        layer.cpu()  # where it is already; a layer prepares its weight again after each move
        assert isinstance(layer, PackedLinear)
        return_freed_memory(freed_bytes=4 * layer.in_features * layer.out_features)

    for layer in source.layers.values():
        layer.register_forward_hook(forget)


def _round_rest_(source: PackedSource, exporter: Exporter) -> None:
    """Round biases of packed layers and all weights that are in none, in place of the model that was read."""
    packed = source.layers
    own = {f"{name}.{end}" for name, layer in packed.items() for end in layer.state_dict() if end != "bias"}
    state = {
        key: cast(value, exporter.dtype).float() for key, value in source.model.state_dict().items() if key not in own
    }
    source.model.load_state_dict(state, strict=False, assign=True)


def _call_watched(source: PackedSource, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs [B, rows, K] of every layer in one call of the packed model, and its output."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
            seen.setdefault(name, entered_input(arguments, keywords).detach().clone())

        return hook

    hooks = [layer.register_forward_pre_hook(keep(name), with_kwargs=True) for name, layer in source.layers.items()]
    try:
        output = call_fixed(source.model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen, output


def _watch(source: PackedSource, timestep: float) -> tuple[dict[str, Tensor], Tensor | None]:
    """Normal inputs [1, rows, K] with one loud channel for every layer, whose noise band is told the timestep."""
    generator = torch.Generator().manual_seed(SEED)
    seen = {}
    for name, layer in source.layers.items():
        with layer.noise_band.calling("cond"):
            layer.noise_band.set_timestep(torch.tensor([timestep]))
        seen[name] = torch.randn(1, WATCHED_ROWS, layer.in_features, generator=generator)
        seen[name][..., 0] *= 10
    return seen, None


def _layer_parity(
    name: str, x: Tensor, layer: PackedLinear, exported: nn.Module, half: nn.Module | None, fit: Fit
) -> LayerParity:
    x = x.reshape(1, -1, x.shape[-1])[:, :WATCHED_ROWS]
    wanted = layer(x)
    output = Difference.of(exported(x), wanted)
    half_sums = None if half is None else Difference.of(half(x), wanted)
    return_freed_memory(freed_bytes=4 * layer.in_features * layer.out_features)
    return LayerParity(name=name, trained=layer.form.label, fit=fit, output=output, half_sums=half_sums)


def _exported_transformer(
    source: PackedSource, model: ExportedModel, linears: Mapping[str, ExportedLinear]
) -> nn.Module:
    """A second transformer on the same mapped file, with the exported tensors in place of the packed ones."""
    other = open_packed(source.directory, names=None).model
    unknown = other.load_state_dict(dict(model.rest), strict=False, assign=True).unexpected_keys
    assert not unknown, "the rest has the names of the model that it came from"
    for name, linear in linears.items():
        other.set_submodule(name, linear)
    return other.float()
