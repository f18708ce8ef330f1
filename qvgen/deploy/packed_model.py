"""The transformer of a packed checkpoint, built once its manifest is known to fit the file that lies beside it.

    manifest's numbers --> one block on the meta device --> compared with the header --> all blocks --> packed layers
                           costs no memory, whatever they are     bounded by the file

A number of a manifest can ask for anything: 2^31 blocks, positions for 10^9 tokens. So a transformer of one block is built
first, on the meta device, where a tensor has a shape and no memory. Its tensors must be those of the file; so many blocks
must be in the file; and what a configuration computes from numbers alone (rotary tables, positional embeddings), which is in
no file, may take as much memory as the file and :data:`TABLE_BYTES`. Only then are all blocks built.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from qvgen.config.plain_json import flag, items, number, text, whole
from qvgen.deploy.delta_switch import add_switch, check_switch
from qvgen.deploy.manifest import MANIFEST_FILE, SUPPORTED_TRANSFORMERS, WEIGHTS_FILE, LayerEntry, Manifest
from qvgen.deploy.packed_file import TensorForm, read_header
from qvgen.layers.noise_band import NoiseBand, watch_timestep
from qvgen.layers.packed_linear import PackedLinear
from qvgen.layers.packed_weight import PackedWeight
from qvgen.quant.finite import check_finite

TABLE_BYTES = 320 * 2**20
"""Of tables that are in no file, beyond the file's size; the positions of CogVideoX-2b take 260 MiB beside 900 of weights."""

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.int8: "I8"}
_FLOATS = ("F32", "BF16", "F16")
_DAMAGED = "fold the run's checkpoint again, or copy the whole packed directory again"


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
    _check_config(manifest, source=source)
    _check_sizes(manifest, header, source=source, weights=weights)
    model = _build(manifest, manifest.transformer_config, source=source, empty=empty)
    put_packed_layers_(model, manifest, kernel=kernel, source=source)
    _check_tensors(model, header, source=weights)
    for name in manifest.skipped:
        if type(skipped := dict(model.named_modules()).get(name)) is not nn.Linear:
            raise ValueError(f"{source}: {name!r} is skipped and is {type(skipped).__name__}, no Linear; {_DAMAGED}")
    return model


def put_packed_layers_(model: nn.Module, manifest: Manifest, *, kernel: str, source: Path) -> None:
    """Replace Linears by the manifest's packed layers, their tensors on the meta device.

    Raises:
        ValueError: Names the layer that the model does not have, or that does not fit.
    """
    band = NoiseBand(manifest.num_noise_bands)
    try:
        if manifest.timesteps is not None:
            band.use_timesteps_(manifest.timesteps)
            band.strict = manifest.strict_timesteps
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    for entry in manifest.layers:
        _swap(model, entry, band=band, kernel=kernel, source=source)
    watch_timestep(model, band)
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
    check_finite(tensors.items(), source=str(source), remedy=_DAMAGED)
    for prefix, module in model.named_modules():
        if not isinstance(module, PackedWeight):
            continue
        for name, (low, high) in module.value_ranges().items():
            values = tensors[f"{prefix}.{name}"]
            values = values.abs() if name == "input_scale" else values  # it may hold a rotation's signs
            lowest, highest = (float(bound) for bound in torch.aminmax(values))
            if lowest < low or highest > high:
                raise ValueError(
                    f"{source}: '{prefix}.{name}' holds values from {lowest:g} to {highest:g}, which must be in "
                    f"{low:g}..{high:g}; {_DAMAGED}"
                )


def _check_config(manifest: Manifest, *, source: Path) -> None:
    """Raise ValueError for an argument that the transformer's class does not have, of another type, or out of range."""
    constructor = getattr(diffusers, manifest.transformer).__init__
    known = inspect.signature(constructor).parameters
    hints = typing.get_type_hints(inspect.unwrap(constructor))
    for key, value in manifest.transformer_config.items():
        if key not in hints:
            raise ValueError(f"{source}: base.config has {key!r}, which {manifest.transformer} does not take")
        try:
            _check_argument(value, hints[key], name=f"base.config.{key}", default=known[key].default)
        except ValueError as error:
            raise ValueError(f"{source}: {error}; export the checkpoint again") from error


def _check_argument(value: Any, hint: Any, *, name: str, default: object) -> None:
    """Hold a value to its annotation, and to the sign of the class's own: what counts or scales is above 0."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is not None:
            kind = next(kind for kind in arguments if kind is not type(None))
            _check_argument(value, kind, name=name, default=default)
    elif origin is tuple:
        for entry in items(value, name):
            _check_argument(entry, arguments[0], name=name, default=1)
    elif hint is int:
        whole(value, name, low=0 if default == 0 else 1)
    elif hint is float:
        if number(value, name) < 0 or (value == 0 and default != 0):
            raise ValueError(f"{name}={value} is not above 0")
    else:
        {bool: flag, str: text}[hint](value, name)


def _check_sizes(manifest: Manifest, header: Mapping[str, TensorForm], *, source: Path, weights: Path) -> None:
    """Compare a transformer of one block with the file before as many are built as the manifest says."""
    config, blocks = manifest.transformer_config, SUPPORTED_TRANSFORMERS[manifest.transformer]
    sizes = inspect.signature(getattr(diffusers, manifest.transformer).__init__).parameters
    count = config.get("num_layers", sizes["num_layers"].default)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that are refused a few lines below
        one = _build(manifest, {**config, "num_layers": 1}, source=source, empty=True)
    packed, first = {entry.name for entry in manifest.layers}, re.compile(rf"(?<=^{blocks}\.)\d+(?=\.)")
    for entry in manifest.layers:
        found_block = first.search(entry.name)
        in_range = found_block is not None and int(found_block[0]) < count
        _find_linear(one, entry, name=first.sub("0", entry.name) if in_range else entry.name, source=source)
    expected = one.state_dict()
    for name, value in expected.items():
        found = header.get(name)
        if found is None and name.rpartition(".")[0] not in packed:
            raise ValueError(f"{weights} lacks the tensor {name!r}")
        if found is not None and found.shape != value.shape:
            raise ValueError(
                f"{weights}: {name!r} has shape {list(found.shape)}, the manifest asks for {list(value.shape)}"
            )
    in_block = sum(name.startswith(f"{blocks}.") for name in expected)
    if count * in_block > len(header):
        raise ValueError(
            f"{source}: base.config.num_layers={count} blocks of {in_block} tensors are more than the {len(header)} tensors "
            f"of {weights}; {_DAMAGED}"
        )
    _check_tables(one, expected, allowed=TABLE_BYTES + weights.stat().st_size, source=source)


def _check_tables(model: nn.Module, stored: Mapping[str, Tensor], *, allowed: int, source: Path) -> None:
    tables = {name: buffer for name, buffer in model.named_buffers() if name not in stored}
    needed = sum(buffer.numel() * buffer.element_size() for buffer in tables.values())
    if needed > allowed:
        raise ValueError(
            f"{source}: its configuration asks for tables of {needed} bytes ({', '.join(tables)}), more than the {allowed} "
            f"that a file of this size can need; {_DAMAGED}"
        )


def _build(manifest: Manifest, config: Mapping[str, Any], *, source: Path, empty: bool) -> nn.Module:
    """A transformer with parameters on the meta device, its buffers there or real (positions are not in a state dict)."""
    transformer = getattr(diffusers, manifest.transformer)
    try:
        with torch.device("meta") if empty else init_empty_weights(include_buffers=False):
            model: nn.Module = transformer.from_config(dict(config))
    except Exception as error:  # whatever a class of diffusers raises for sizes that nobody has tried
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{source}: its configuration builds no {manifest.transformer}: {reason}") from error
    return model


def _find_linear(model: nn.Module, entry: LayerEntry, *, name: str, source: Path) -> None:
    """Raise ValueError unless a model has the Linear that a packed layer stands for."""
    try:
        linear = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(
            f"{source} names the layer {entry.name!r}, which {type(model).__name__} does not have"
        ) from error
    wanted = (entry.out_features, entry.in_features)
    if not isinstance(linear, nn.Linear) or (linear.out_features, linear.in_features) != wanted:
        raise ValueError(
            f"{source}: layer {entry.name!r} of shape {list(wanted)} does not fit the model's {_described(linear)}"
        )


def _swap(model: nn.Module, entry: LayerEntry, *, band: NoiseBand, kernel: str, source: Path) -> None:
    _find_linear(model, entry, name=entry.name, source=source)
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


def _described(module: nn.Module) -> str:
    shape = f" of shape {[module.out_features, module.in_features]}" if isinstance(module, nn.Linear) else ""
    return type(module).__name__ + shape


def _check_tensors(model: nn.Module, header: Mapping[str, TensorForm], *, source: Path) -> None:
    """Raise ValueError for the first tensor that is missing, too much, or of the wrong shape or type."""
    expected = model.state_dict()
    for name, value in expected.items():
        if name not in header:
            raise ValueError(f"{source} lacks the tensor {name!r}")
        found = header[name]
        if found.shape != value.shape:
            raise ValueError(
                f"{source}: {name!r} has shape {list(found.shape)}, the manifest asks for {list(value.shape)}"
            )
        exact = isinstance(model.get_submodule(name.rpartition(".")[0]), PackedWeight)
        wanted = _FLOATS if value.is_floating_point() and not exact else (_NAMES.get(value.dtype, str(value.dtype)),)
        if found.dtype not in wanted:
            raise ValueError(f"{source}: {name!r} is {found.dtype}, {' or '.join(wanted)} is needed")
    if extra := sorted(set(header) - set(expected)):
        raise ValueError(f"{source} holds the tensor {extra[0]!r}, which the manifest does not know")
