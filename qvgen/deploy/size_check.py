"""Whether the numbers of a manifest fit the file of weights beside it, found out before a model of that size is built.

    manifest's numbers --> one block on the meta device --> compared with the header --> all blocks --> packed layers
                           costs no memory, whatever they are     bounded by the file

A number of a manifest can ask for anything: 2^31 blocks, positions for 10^9 tokens. So a transformer of one block is built
first, on the meta device, where a tensor has a shape and no memory. Its tensors must be those of the file; so many blocks
must be in the file; and what a configuration computes from numbers alone (rotary tables, positional embeddings), which is in
no file, may take as much memory as the file and :data:`TABLE_BYTES`. Only then are all blocks built.
"""

from __future__ import annotations

import inspect
import types
import typing
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from qvgen.config.plain_json import flag, items, mapping, number, text, whole
from qvgen.deploy.manifest import LayerEntry, Manifest
from qvgen.deploy.packed_file import TensorForm
from qvgen.deploy.transformer_class import block_counts, transformer_class

TABLE_BYTES = 320 * 2**20
"""Bytes that tables which are in no file may take beyond the file's size; CogVideoX-2b's positions take 260 MiB."""

DAMAGED = "fold the run's checkpoint again, or copy the whole packed directory again"

_NESTED = (list, tuple, dict)


def check_config(manifest: Manifest, *, source: Path) -> None:
    """Raise ValueError for an argument that the transformer's class does not have, of another type, or out of range."""
    constructor = transformer_class(manifest.transformer).__init__
    known = inspect.signature(constructor).parameters
    hints = typing.get_type_hints(inspect.unwrap(constructor))
    for key, value in manifest.transformer_config.items():
        if key not in known:
            raise ValueError(f"{source}: base.config has {key!r}, which {manifest.transformer} does not take")
        if value is None and known[key].default is None:
            continue  # EasyAnimate's class calls it int
        try:
            _check_argument(value, hints.get(key, Any), name=f"base.config.{key}", default=known[key].default)
        except ValueError as error:
            raise ValueError(f"{source}: {error}; export the checkpoint again") from error


def _check_argument(value: Any, hint: Any, *, name: str, default: object) -> None:
    """Hold a value to its annotation, and to the sign of the class's own: what counts or scales is above 0."""
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        kinds = [kind for kind in arguments if kind is not type(None)]
        nested = isinstance(value, list | dict)
        fits = [kind for kind in kinds if ((typing.get_origin(kind) or kind) in _NESTED) == nested]
        if value is not None or len(kinds) == len(arguments):
            _check_argument(value, (fits or kinds)[0], name=name, default=default)
    elif origin in (tuple, list):
        for entry in items(value, name):
            _check_argument(entry, arguments[0] if arguments else Any, name=name, default=1)
    elif origin is dict:
        for key, entry in mapping(value, name).items():
            _check_argument(entry, arguments[1] if arguments else Any, name=f"{name}.{key}", default=0)
    elif hint is int:
        whole(value, name, low=0 if default == 0 else 1)
    elif hint is float:
        if number(value, name) < 0 or (value == 0 and default != 0):
            raise ValueError(f"{name}={value} is not above 0")
    elif hint in (bool, str):
        {bool: flag, str: text}[hint](value, name)
    elif hint is Any:
        kind = {list: list[Any], dict: dict[str, Any]}.get(type(value), type(value))  # type: ignore[misc]
        if value is not None:
            _check_argument(value, kind, name=name, default=0)
    else:
        raise ValueError(f"{name}={value!r} is for an argument of type {hint}, which no manifest can hold")


def check_sizes(manifest: Manifest, header: Mapping[str, TensorForm], *, source: Path, weights: Path) -> None:
    """Compare a transformer with one block of each kind with the file before as many are built as the manifest says."""
    config = manifest.transformer_config
    counts = block_counts(transformer_class(manifest.transformer), config)
    single = {**config, **{key: min(value, 1) for key, value in counts.items()}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that are refused a few lines below
        one = instantiate(manifest, single, source=source, empty=True)
        size = len(one.state_dict())
        for key, count in counts.items():
            if count > 1:
                # A block may need others beside it, of another count: then one more of it alone builds nothing.
                in_block = _tensors_of_a_block(manifest, single, key, size=size, source=source)
                _check_count(key, count, in_block=in_block, header=header, source=source, weights=weights)
    # Blocks of one kind need not be alike (Mochi's last one is not), and more of them take no memory on the meta device:
    # they are compared when all are built. What stands outside of them is compared now.
    packed, blocks = {entry.name for entry in manifest.layers}, _block_names(one)
    for entry in manifest.layers:
        if not _in_some_block(one, entry.name, blocks, last=max(counts.values(), default=0)):
            find_linear(one, entry, name=entry.name, source=source)
    expected = one.state_dict()
    for name, value in expected.items():
        form = header.get(name)
        if name.startswith(blocks):
            continue
        if form is None and name.rpartition(".")[0] not in packed:
            raise ValueError(f"{weights} lacks the tensor {name!r}")
        if form is not None and form.shape != value.shape:
            raise ValueError(
                f"{weights}: {name!r} has shape {list(form.shape)}, the manifest asks for {list(value.shape)}"
            )
    check_tables(one, expected, allowed=TABLE_BYTES + weights.stat().st_size, source=source)


def _tensors_of_a_block(manifest: Manifest, single: Mapping[str, Any], key: str, *, size: int, source: Path) -> int:
    """Tensors that one more block of a kind has; 1 where it can't be told."""
    try:
        return max(1, len(instantiate(manifest, {**single, key: 2}, source=source, empty=True).state_dict()) - size)
    except ValueError:
        return 1


def _check_count(
    key: str, count: int, *, in_block: int, header: Mapping[str, TensorForm], source: Path, weights: Path
) -> None:
    if count * in_block > len(header):
        raise ValueError(
            f"{source}: base.config.{key}={count} blocks of {in_block} tensors are more than the {len(header)} tensors "
            f"of {weights}; {DAMAGED}"
        )


def _block_names(one: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names in the lists of blocks of a transformer that has one block of each kind."""
    lists = [name for name, module in one.named_modules() if isinstance(module, nn.ModuleList) and len(module) == 1]
    return tuple(f"{name}." for name in lists)


def _in_some_block(one: nn.Module, name: str, blocks: Sequence[str], *, last: int) -> bool:
    """Whether a name is in a block that the configuration has, where nothing else than a Linear is known to have it."""
    for prefix in blocks:
        number, _, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and number.isdecimal() and int(number) < last:
            first = dict(one.named_modules()).get(f"{prefix}0.{rest}")  # None where the first block lacks such a module
            return first is None or isinstance(first, nn.Linear)
    return False


def check_tables(model: nn.Module, stored: Mapping[str, Tensor], *, allowed: int, source: Path) -> None:
    """Raise ValueError for buffers beside those in ``stored`` that take more than so many bytes together."""
    tables = {name: buffer for name, buffer in model.named_buffers() if name not in stored}
    needed = sum(buffer.numel() * buffer.element_size() for buffer in tables.values())
    if needed > allowed:
        raise ValueError(
            f"{source}: its configuration asks for tables of {needed} bytes ({', '.join(tables)}), more than the {allowed} "
            f"that a file of this size can need; {DAMAGED}"
        )


def instantiate(manifest: Manifest, config: Mapping[str, Any], *, source: Path, empty: bool) -> nn.Module:
    """A transformer with parameters on the meta device, its buffers there or real (positions are not in a state dict)."""
    transformer = transformer_class(manifest.transformer)
    try:
        with torch.device("meta") if empty else init_empty_weights(include_buffers=False):
            model: nn.Module = transformer.from_config(dict(config))
    except Exception as error:  # whatever a class of diffusers raises for sizes that nobody has tried
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{source}: its configuration builds no {manifest.transformer}: {reason}") from error
    return model


def find_linear(model: nn.Module, entry: LayerEntry, *, name: str, source: Path) -> None:
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


def _described(module: nn.Module) -> str:
    shape = f" of shape {[module.out_features, module.in_features]}" if isinstance(module, nn.Linear) else ""
    return type(module).__name__ + shape
