"""Layers that read the same input, such as q, k and v of an attention: which they are, and one activation quantizer for them.

Where such layers quantize their input alike, a packed model does it once for all of them
(:mod:`qvgen.deploy.merged_linear`). A PTQ method leaves them alike; training would give each its own clips. So they share one
quantizer *module*: its Parameters are in the optimizer, the gradient norm and the processes' exchange once, its gradient
is the sum of the layers', and moving or sharding the model can't take them apart. A state dict has it under each layer's
name, so that checkpoints, packed files and manifests are those of layers apart.

Which layers read the same input is a family's declaration (``VideoDiT.shared_inputs``).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.layer_form import LayerForm


def shared_input_sets(names: Iterable[str], declared: Iterable[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """The sets of layers that read the same input.

    Args:
        names: Names of a model's Linears, quantized or not, in the model's order.
        declared: Ends of names that read the same input wherever they stand side by side; what a variant of a model does
            not have matches nothing.

    Example:
        >>> names = ["blocks.0.attn1.to_q", "blocks.0.attn1.to_k", "blocks.1.attn1.to_q", "blocks.1.attn1.to_k", "to_k"]
        >>> shared_input_sets(names, [("attn1.to_q", "attn1.to_k"), ("attn2.to_k", "attn2.to_v")])
        (('blocks.0.attn1.to_q', 'blocks.0.attn1.to_k'), ('blocks.1.attn1.to_q', 'blocks.1.attn1.to_k'))
    """
    places = {name: place for place, name in enumerate(names)}
    found = []
    for ends in declared:
        starts = [name.removesuffix(ends[0]) for name in places if f".{name}".endswith(f".{ends[0]}")]
        sets = [tuple(start + end for end in ends) for start in starts]
        found += [names for names in sets if all(name in places for name in names)]
    return tuple(sorted(found, key=lambda names: places[names[0]]))


def share_activations_(
    layers: Mapping[str, FakeQuantLinear], sets: Iterable[Sequence[str]]
) -> tuple[tuple[str, ...], ...]:
    """Give the layers of each set one activation quantizer, that of its first; the outputs stay as they are, to the bit.

    This happens only in a set all of whose layers are quantized and alike: with the same grids, rotation and table of widths,
    and equal values of smoothing and of every width's tables. (On the meta device, where there are no values, the rest
    decides.) Layers of all other sets get quantizers of their own back, where they shared one before.

    Args:
        layers: All quantized layers of a model by name.
        sets: The sets that :func:`shared_input_sets` gives.

    Returns:
        The sets that share one now.
    """
    unshare_activations_(layers)
    chosen = alike_sets(layers, sets)
    for names in chosen:
        tie_activations_([layers[name] for name in names])
    return chosen


def alike_sets(layers: Mapping[str, FakeQuantLinear], sets: Iterable[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """The sets all of whose layers are quantized and quantize their input alike."""
    return tuple(
        tuple(names)
        for names in sets
        if all(name in layers for name in names) and _are_alike([layers[name] for name in names])
    )


def tie_activations_(layers: Sequence[FakeQuantLinear]) -> None:
    """Let layers have the first one's activation quantizers, for every width."""
    for other in layers[1:]:
        other.activation_quantizer = layers[0].activation_quantizer
        other.other_activation_quantizers = layers[0].other_activation_quantizers


def unshare_activations_(layers: Mapping[str, FakeQuantLinear]) -> None:
    """Give every layer activation quantizers of its own again, with the values that it has now."""
    for names in activation_sharing(layers):
        for name in names[1:]:
            layer = layers[name]
            layer.activation_quantizer = copy.deepcopy(layer.activation_quantizer)
            layer.other_activation_quantizers = copy.deepcopy(layer.other_activation_quantizers)


def activation_sharing(layers: Mapping[str, FakeQuantLinear]) -> tuple[tuple[str, ...], ...]:
    """Names of the layers that share an activation quantizer, in sets of two or more."""
    users: dict[int, list[str]] = {}
    for name, layer in layers.items():
        users.setdefault(id(layer.activation_quantizer), []).append(name)
    return tuple(tuple(names) for names in users.values() if len(names) > 1)


def _are_alike(layers: Sequence[FakeQuantLinear]) -> bool:
    form, values = LayerForm.of(layers[0]), _values(layers[0])
    return all(
        LayerForm.of(other) == form and all(_equal(*pair) for pair in zip(values, _values(other), strict=True))
        for other in layers[1:]
    )


def _values(layer: FakeQuantLinear) -> list[Tensor]:
    """The tensors that decide an input's codes besides the layer's form."""
    tables = [p for _, quantizer in sorted(layer.activation_quantizers().items()) for p in quantizer.parameters()]
    return tables if layer.input_scale is None else [*tables, layer.input_scale]


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.is_meta or other.is_meta or torch.equal(one, other)
