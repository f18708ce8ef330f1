"""A transformer with packed layers from a checkpoint of QVGen's own release: its codes, scales, zero points and clips.

The checkpoint's codes go into the packed tensors as they are: our quantizer would clamp a zero point that is outside of
[0, P]. Layers are read, converted and held to the release's arithmetic one after another; the full-precision weights of
two layers are never in memory together. Every other tensor becomes float32, which holds it exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from qvgen.config.bits import Bits
from qvgen.deploy.fixed_inputs import call_fixed, fixed_inputs
from qvgen.deploy.importers.release_check import LayerCheck, check_layer
from qvgen.deploy.importers.release_file import ReleaseFile
from qvgen.deploy.importers.release_layer import ReleaseLayer, WeightCount, merge_lora
from qvgen.deploy.importers.sampler_clips import ClipTable
from qvgen.deploy.packed_record import plain_config
from qvgen.layers.guidance_call import watch_calls
from qvgen.layers.layer_form import LayerForm
from qvgen.layers.layer_input import entered_input
from qvgen.layers.noise_band import NoiseBand, watch_timestep
from qvgen.layers.packed_linear import PackedLinear
from qvgen.layers.swap import packed_layers
from qvgen.quant.grid import Grid, Profile
from qvgen.quant.packing import pack_codes

NUM_CHECKED = 5
"""Layers that are held to the release's arithmetic on random inputs."""

_MOST_CLAMPED = 0.25
"""Share of weights beyond the codes' range above which the checkpoint has more bits than were given."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A transformer that was imported, and what was found and checked on the way.

    Attributes:
        model: The transformer, on the CPU, with the exact reference kernel.
        weights: Counts over all quantized layers.
        checks: The layers that were held to the release's arithmetic, by name.
        dtypes: Types of the quantized layers' tensors in the checkpoint.
    """

    model: nn.Module
    weights: WeightCount
    checks: Mapping[str, LayerCheck]
    dtypes: tuple[str, ...]


def empty_transformer(build: Callable[[Mapping[str, Any]], nn.Module], config: Mapping[str, Any]) -> nn.Module:
    """A base model's transformer, its parameters on the meta device and its tables, which are in no file, real."""
    with init_empty_weights(include_buffers=False):
        return build(config)


def check_same_config(config: Mapping[str, Any] | None, base: nn.Module, *, source: object, name: str) -> None:
    """Hold the arguments in a checkpoint's config.json to those of the base model; nothing is built from them.

    Raises:
        ValueError: It is of another class, says that it is quantized, or has another argument.
    """
    if config is None:
        return
    where = f"source={source}: its config.json"
    if (found := config.get("_class_name", type(base).__name__)) != type(base).__name__:
        raise ValueError(
            f"{where} says {found}, model={name} is a {type(base).__name__}; choose the model of the checkpoint"
        )
    if "quantization_config" in config:
        raise ValueError(f"{where} has a quantization_config, which the release never writes; it is of another program")
    own = plain_config(base)
    for key, value in config.items():
        if not key.startswith("_") and (key not in own or own[key] != value):
            raise ValueError(
                f"{where} has {key}={value!r}, and model={name} has {own.get(key, 'no such argument')!r}; choose the model "
                "that the checkpoint was made from"
            )


@torch.no_grad()
def import_release(release: ReleaseFile, base: nn.Module, *, bits: Bits, clips: ClipTable) -> Imported:
    """Fill an empty transformer with a checkpoint.

    Args:
        release: The checkpoint, held to ``base``.
        base: See :func:`empty_transformer`; it becomes the result.
        bits: What the checkpoint was trained with; the file does not say it.
        clips: The tables.

    Raises:
        ValueError: A value that is not finite, a scale that is not above 0, other bits than these, or a layer that does not
            compute what the release computes.
    """
    band = NoiseBand(len(clips.mix))
    if clips.timesteps is not None:
        band.use_timesteps_(clips.timesteps, guided=clips.guided)
        band.strict = True
    form = LayerForm(profile=release_profile(bits))
    names, counts, checks, dtypes = release.layers, [], {}, set()
    checked = {names[index * (len(names) - 1) // max(1, NUM_CHECKED - 1)] for index in range(NUM_CHECKED)}
    for name in names:
        layer = read_layer(release, name, bits=bits)
        packed = pack_layer(layer, form=form, noise_band=band, clips=clips)
        counts.append(WeightCount.of(layer))
        dtypes.add(str(layer.weight.dtype).removeprefix("torch."))
        if name in checked:
            checks[name] = check_layer(layer, packed, clips=clips, name=name)
        base.set_submodule(name, packed)
    weights = sum(counts[1:], start=counts[0])
    check_bits(weights, bits=bits)
    prefixes = tuple(f"{name}." for name in names)
    rest = {key: release.tensor(key).float() for key in base.state_dict() if not key.startswith(prefixes)}
    base.load_state_dict(rest, strict=False, assign=True)
    watch_timestep(base, band)
    if clips.guided:
        watch_calls(base, band)
    base.requires_grad_(False).eval()
    return Imported(model=base, weights=weights, checks=checks, dtypes=tuple(sorted(dtypes)))


def release_profile(bits: Bits) -> Profile:
    """The release's grids: weights per row with a real zero point, activations per token with an integer one."""
    return Profile(
        name="paper",
        weight=Grid(bits=bits.weight, granularity="per_channel", zero_point="real"),
        activation=Grid(bits=bits.activation, granularity="per_token"),
    )


def read_layer(release: ReleaseFile, name: str, *, bits: Bits) -> ReleaseLayer:
    """One layer's tensors; raises ValueError for a scale that is not above 0."""

    def tensor(end: str) -> Tensor:
        return release.tensor(f"{name}.{end}")

    weight = tensor("w")
    if name in release.loras:
        weight = merge_lora(weight, tensor("loraA"), tensor("loraB"))
    layer = ReleaseLayer(
        weight=weight,
        bias=tensor("b") if f"{name}.b" in release.shapes else None,
        scale=tensor("wquantizer.scale"),
        zero_point=tensor("wquantizer.zero_point"),
        lower=tensor("aquantizer.lower"),
        upper=tensor("aquantizer.upper"),
        bits=bits.weight,
        activation_bits=bits.activation,
    )
    if (lowest := float(layer.qparams()[0].min())) <= 0:
        raise ValueError(
            f"source={release.source}: '{name}.wquantizer.scale' holds {lowest:g}, and a scale is above 0; get the "
            "checkpoint again, or train it again"
        )
    return layer


def pack_layer(layer: ReleaseLayer, *, form: LayerForm, noise_band: NoiseBand, clips: ClipTable) -> PackedLinear:
    """The packed layer of the same codes, scales, zero points, clips and bias."""
    rows, columns = layer.weight.shape
    packed = PackedLinear(
        columns, rows, bias=layer.bias is not None, form=form, noise_band=noise_band, kernel="reference"
    )
    for plane, codes in zip(packed.planes, pack_codes(layer.codes(), bits=layer.bits), strict=True):
        plane.copy_(codes)
    scale, zero_point = layer.qparams()
    packed.weight_scale.copy_(scale.reshape(-1))
    assert packed.weight_zero_point is not None, "the grid has a real one"
    packed.weight_zero_point.copy_(zero_point.reshape(-1))
    low, high = layer.factors()
    for table, factors in ((packed.clip_low, low), (packed.clip_high, high)):
        assert isinstance(table, Tensor)
        table.copy_(clips.table(factors))
    if packed.bias is not None and layer.bias is not None:
        packed.bias.copy_(layer.bias)
    weight = layer.weight.double()
    error = (packed.dequantized_weight().double() - weight).square().sum() / weight.square().sum().clamp(min=1e-30)
    packed.weight_error = float(error)
    return packed


def check_bits(weights: WeightCount, *, bits: Bits) -> None:
    """Raise ValueError where the codes do not look like those of weights with so many bits."""
    share = weights.clamped / weights.values
    if share > _MOST_CLAMPED:
        raise ValueError(
            f"bits={bits.label}: {100 * share:.0f} % of the weights are beyond codes 0..{2**bits.weight - 1}; the checkpoint "
            f"has more bits, write for example bits=w{bits.weight + 1}a{bits.activation}"
        )
    if weights.at_both_ends < weights.rows / 2:
        raise ValueError(
            f"bits={bits.label}: {weights.at_both_ends} of {weights.rows} rows reach both code 0 and code "
            f"{2**bits.weight - 1}; the checkpoint has fewer bits, write for example "
            f"bits=w{bits.weight - 1}a{bits.activation}"
        )


@torch.no_grad()
def count_tokens_without_zero(model: nn.Module, *, timestep: float) -> tuple[int, int] | None:
    """Tokens of quantized layers whose values all have one sign, and all tokens, in one call on fixed small inputs.

    The release loses what such a token has beyond its width; a packed layer's range includes 0, and loses nothing.

    Returns:
        None for a class without fixed inputs.
    """
    inputs = fixed_inputs(model, timestep=timestep)
    if inputs is None:
        return None
    found, total = 0, 0

    def count(_: nn.Module, arguments: tuple[Tensor, ...], keywords: Mapping[str, Any]) -> None:
        nonlocal found, total
        tokens = entered_input(arguments, keywords).flatten(0, -2)
        found += int(((tokens.amin(1) > 0) | (tokens.amax(1) < 0)).sum())
        total += len(tokens)

    hooks = [layer.register_forward_pre_hook(count, with_kwargs=True) for layer in packed_layers(model).values()]
    try:
        call_fixed(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found, total
