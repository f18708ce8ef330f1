"""The transformer of a packed checkpoint: packed layers in the places of Linears, and the tensors of the file in them.

It is built once its manifest is known to fit the file that lies beside it (:mod:`qvgen.deploy.size_check`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qvgen.deploy.attention_entry import put_attentions_
from qvgen.deploy.delta_switch import add_switch, check_switch
from qvgen.deploy.manifest import MANIFEST_FILE, WEIGHTS_FILE, LayerEntry, Manifest
from qvgen.deploy.packed_file import TensorForm, read_header
from qvgen.deploy.size_check import DAMAGED, check_config, check_sizes, find_linear, instantiate
from qvgen.layers.guidance_call import watch_calls
from qvgen.layers.noise_band import NoiseBand, watch_timestep
from qvgen.layers.packed_linear import PackedLinear
from qvgen.layers.packed_weight import PackedWeight
from qvgen.layers.quant_attention import PackedAttention
from qvgen.quant.finite import check_finite

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.int8: "I8"}
_FLOATS = ("F32", "BF16", "F16")

AS_STORED = (PackedWeight, PackedAttention)
"""Modules whose tensors keep the types and the bits that a file has, whatever dtype a model is loaded in."""


def build_packed(directory: Path, manifest: Manifest, *, kernel: str, empty: bool) -> nn.Module:
    """Build the transformer of a packed directory, with packed layers and without any tensor's values.

    Args:
        directory: Its weights' header is read, no more.
        manifest: The directory's.
        kernel: Backend of the packed layers.
        empty: Leave buffers that are in no file on the meta device too, for a check.

    Returns:
        Parameters, codes and scales on the meta device; every name, type and shape is that of the file.

    Raises:
        ValueError: Names the manifest or the file and what does not fit.
    """
    source, weights = directory / MANIFEST_FILE, directory / WEIGHTS_FILE
    header = read_header(weights)
    check_config(manifest, source=source)
    check_sizes(manifest, header, source=source, weights=weights)
    model = instantiate(manifest, manifest.transformer_config, source=source, empty=empty)
    put_packed_layers_(model, manifest, kernel=kernel, source=source)
    check_tensors(model, header, source=weights)
    check_skipped(model, manifest, source=source)
    return model


def check_skipped(model: nn.Module, manifest: Manifest, *, source: Path) -> None:
    """Raise ValueError unless the layers that a manifest calls skipped are Linears of the model."""
    for name in manifest.skipped:
        if type(skipped := dict(model.named_modules()).get(name)) is not nn.Linear:
            raise ValueError(f"{source}: {name!r} is skipped and is {type(skipped).__name__}, no Linear; {DAMAGED}")


def check_bytes(model: nn.Module, manifest: Manifest, *, source: Path) -> None:
    """Raise ValueError for a packed layer whose tensors take other bytes than its manifest says."""
    for entry in manifest.layers:
        layer = model.get_submodule(entry.name)
        assert isinstance(layer, PackedLinear)
        if layer.nbytes() != entry.nbytes:
            raise ValueError(
                f"{source}: the layer {entry.name!r} has {layer.nbytes()} bytes, not {entry.nbytes}; export the checkpoint "
                "again"
            )


def put_packed_layers_(model: nn.Module, manifest: Manifest, *, kernel: str, source: Path) -> None:
    """Replace Linears by the manifest's packed layers, their tensors on the meta device.

    Raises:
        ValueError: Names the layer that the model does not have, or that does not fit.
    """
    band = NoiseBand(manifest.num_noise_bands)
    try:
        if manifest.timesteps is not None:
            band.use_timesteps_(manifest.timesteps, guided=manifest.guided)
            band.strict = manifest.strict_timesteps
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    for entry in manifest.layers:
        _swap(model, entry, band=band, kernel=kernel, source=source)
    put_attentions_(model, manifest.attentions, band=band, kernel=kernel, source=source)
    watch_timestep(model, band)
    if manifest.guided:
        try:
            watch_calls(model, band)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    if manifest.activation_switch is not None:
        add_switch(model, manifest.activation_switch)
        try:
            check_switch(model)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error


def check_values(model: nn.Module, tensors: Mapping[str, Tensor], *, source: Path) -> None:
    """Raise ValueError for the first tensor whose values are not finite, or not what they stand for.

    Args:
        model: With packed layers; its own tensors are not looked at.
        tensors: Its state, by name.
        source: Where the tensors come from or go to.
    """
    check_finite(tensors.items(), source=str(source), remedy=DAMAGED)
    for prefix, module in model.named_modules():
        for name in module.value_ranges() if isinstance(module, AS_STORED) else ():
            check_range(module, name, tensors[f"{prefix}.{name}"], shown=f"{prefix}.{name}", source=source)


def check_value(model: nn.Module, name: str, value: Tensor, *, source: Path) -> None:
    """Do what :func:`check_values` does for one tensor."""
    check_finite([(name, value)], source=str(source), remedy=DAMAGED)
    prefix, _, own = name.rpartition(".")
    module = model.get_submodule(prefix)
    if isinstance(module, AS_STORED):
        check_range(module, own, value, shown=name, source=source)


def check_range(module: PackedWeight | PackedAttention, name: str, values: Tensor, *, shown: str, source: Path) -> None:
    """Raise ValueError where a tensor of a packed module holds values that can't mean anything.

    Args:
        module: The layer, the codes of one of its widths, or the product of an attention.
        name: The tensor's name in it; one that may hold any values is accepted.
        values: Its values.
        shown: Its name in the model, for the message.
        source: Where it comes from or goes to.
    """
    low, high = module.value_ranges().get(name, (-math.inf, math.inf))
    if values.is_meta or not values.numel() or (low, high) == (-math.inf, math.inf):
        return
    values = values.abs() if name == "input_scale" else values  # it may hold a rotation's signs
    lowest, highest = (float(bound) for bound in torch.aminmax(values))
    if lowest < low or highest > high:
        raise ValueError(
            f"{source}: '{shown}' holds values from {lowest:g} to {highest:g}, which must be in {low:g}..{high:g}; "
            f"{DAMAGED}"
        )


def _swap(model: nn.Module, entry: LayerEntry, *, band: NoiseBand, kernel: str, source: Path) -> None:
    find_linear(model, entry, name=entry.name, source=source)
    try:
        packed = PackedLinear(
            entry.in_features,
            entry.out_features,
            bias=entry.bias,
            form=entry.form,
            noise_band=band,
            kernel=kernel,
            device="meta",  # its tensors are those of the file
        )
    except ValueError as error:
        raise ValueError(f"{source}: layer {entry.name!r}: {error}") from error
    packed.weight_error = entry.weight_error
    model.set_submodule(entry.name, packed)


def check_tensors(model: nn.Module, header: Mapping[str, TensorForm], *, source: Path) -> None:
    """Raise ValueError for the first tensor that is missing, too much, or of the wrong shape or type."""
    expected = model.state_dict()
    for name, value in expected.items():
        if name not in header:
            raise ValueError(f"{source} lacks the tensor {name!r}")
        stored = header[name]
        if stored.shape != value.shape:
            raise ValueError(
                f"{source}: {name!r} has shape {list(stored.shape)}, the manifest asks for {list(value.shape)}"
            )
        exact = isinstance(model.get_submodule(name.rpartition(".")[0]), AS_STORED)
        wanted = _FLOATS if value.is_floating_point() and not exact else (_NAMES.get(value.dtype, str(value.dtype)),)
        if stored.dtype not in wanted:
            raise ValueError(f"{source}: {name!r} is {stored.dtype}, {' or '.join(wanted)} is needed")
    if extra := sorted(set(header) - set(expected)):
        raise ValueError(f"{source} holds the tensor {extra[0]!r}, which the manifest does not know")
