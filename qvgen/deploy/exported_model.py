"""A packed checkpoint in the form of a target: checked whole, its layers held to what the target can carry, then converted.

Layers are read from the mapped file one after another, and what is made of each goes to the disk at once
(:mod:`qvgen.deploy.tensor_spool`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from qvgen.deploy.exporters.base import ExportedModel, Exporter, Fit, Target, cast
from qvgen.deploy.manifest import WEIGHTS_FILE, Manifest, read_manifest
from qvgen.deploy.memory_return import return_freed_memory
from qvgen.deploy.packed_file import StageClock, file_checked, map_tensors
from qvgen.deploy.packed_model import build_packed, check_values
from qvgen.deploy.tensor_spool import TensorSpool
from qvgen.errors import UserError
from qvgen.layers.packed_linear import PackedLinear
from qvgen.models.original.names import OriginalNames
from qvgen.models.original.tensors import original_sources
from qvgen.quant.finite import check_finite

NO_NAMES = "name its family when it is saved (base_name=...), or choose another target"


@dataclass(frozen=True, kw_only=True)
class PackedSource:
    """A packed checkpoint that was read whole and is right.

    Attributes:
        directory: Its folder.
        manifest: Its manifest.
        model: The transformer with packed layers, not fused, on the CPU.
        names: The original names of its family; None where it has none.
    """

    directory: Path
    manifest: Manifest
    model: nn.Module
    names: OriginalNames | None

    @property
    def layers(self) -> dict[str, PackedLinear]:
        """The packed layers, in the model's order."""
        found = {entry.name: self.model.get_submodule(entry.name) for entry in self.manifest.layers}
        return {name: layer for name, layer in found.items() if isinstance(layer, PackedLinear)}


def open_packed(directory: Path, *, names: OriginalNames | None) -> PackedSource:
    """Read a packed checkpoint for another use than running it fast: with the exact reference kernel and nothing fused.

    Raises:
        ValueError: Anything that :func:`qvgen.deploy.checkpoint.load_packed` refuses.
    """
    manifest = read_manifest(directory)
    with file_checked(directory, manifest, StageClock()):
        model = build_packed(directory, manifest, kernel="reference", empty=False)
    tensors = map_tensors(directory)
    check_values(model, tensors, source=directory / WEIGHTS_FILE)
    model.load_state_dict(tensors, strict=True, assign=True)
    model.requires_grad_(False).eval()
    return PackedSource(directory=directory, manifest=manifest, model=model, names=names)


def find_fits(source: PackedSource, target: Target) -> dict[str, Fit]:
    """How the target carries each layer; see :func:`fits_of`."""
    attentions = tuple(entry.name for entry in source.manifest.attentions)
    named = {"base_name": source.manifest.base_name, "names": source.names, "attentions": attentions}
    return fits_of(source.layers, target, **named)


def fits_of(
    layers: Mapping[str, PackedLinear],
    target: Target,
    *,
    base_name: str,
    names: OriginalNames | None,
    attentions: Sequence[str] = (),
) -> dict[str, Fit]:
    """How the target carries each layer, of which no values are needed: they may lie on the meta device.

    Raises:
        UserError: A layer that it can't carry at all, or an attention in 8 bits where qvgen does not run it, by name; or it
            needs original names and the family has none.
    """
    if attentions and isinstance(target, Exporter):
        raise UserError(
            f"{target.runtime} computes attention in floating point, and {attentions[0]} and {len(attentions) - 1} others "
            "compute it in 8 bits; export=diffusers or export=hub keeps them, or train with profile.attention=none"
        )
    if target.needs_original_names and names is None:
        family = (
            f"qvgen knows none for {base_name!r}; choose a target with diffusers' names (bf16 with export.layout=diffusers)"
            if base_name
            else f"the checkpoint does not say of which family it is; {NO_NAMES}"
        )
        raise UserError(f"files for {target.runtime} have the names of the model's own code, and {family}")
    fits = {}
    for name, layer in layers.items():
        try:
            fits[name] = target.fit(layer)
        except ValueError as error:
            raise UserError(f"{target.runtime} can't carry {name!r}: {error}") from error
    if target.needs_original_names and names is not None:
        _check_fused(layers, fits, target=target, names=names)
    return fits


def _check_fused(
    layers: Mapping[str, PackedLinear], fits: Mapping[str, Fit], *, target: Target, names: OriginalNames
) -> None:
    """Hold layers that the runtime has as one, whose input it quantizes once, to one way of quantizing it."""
    weights = [f"{name}.weight" for name in layers if fits[name].quantizes_inputs]
    try:
        sources = original_sources(weights, names)
    except UserError as error:
        raise UserError(
            f"of a layer that {target.runtime} has as one, a part is quantized and another is not: {error}; quantize both "
            "(model.include, model.exclude) or neither"
        ) from error
    for whole, keys in sources.items():
        first, *others = (key.removesuffix(".weight") for key in keys)
        wanted = _input_way(layers[first])
        for other in others:
            if (found := _input_way(layers[other])) != wanted:
                raise UserError(
                    f"{target.runtime} quantizes the input of {whole.removesuffix('.weight')!r} once, and its parts have "
                    f"{wanted} ({first!r}) and {found} ({other!r}); give them one profile"
                )


def _input_way(layer: PackedLinear) -> str:
    profile = layer.profile
    turned = f"{profile.rotation_kind} rotation by {profile.rotation}" if profile.rotation else "no rotation"
    return f"inputs of {profile.activation.bits} bits after {turned}"


def convert(source: PackedSource, exporter: Exporter, *, spool: TensorSpool) -> ExportedModel:
    """All tensors in the target's form.

    Args:
        source: The packed checkpoint.
        exporter: The target.
        spool: Keeps what was converted until the export is written.

    Raises:
        ValueError: A value that is no longer finite in the target's precision, by name.
    """
    packed = source.layers
    origin = f"{source.directory / WEIGHTS_FILE}, exported"
    remedy = f"it does not fit into {exporter.dtype}; write export.dtype=float32"
    layers: dict[str, Mapping[str, Tensor]] = {}

    def converted(name: str) -> dict[str, Tensor]:
        tensors = exporter.tensors(packed[name])
        check_finite(((f"{name}.{end}", tensor) for end, tensor in tensors.items()), source=origin, remedy=remedy)
        return tensors

    for name in packed:
        layers[name] = spool.keep(converted(name))  # no name here holds a layer while the next one is converted
        return_freed_memory(freed_bytes=4 * packed[name].in_features * packed[name].out_features)
    prefixes = tuple(f"{name}." for name in packed)
    rest: dict[str, Tensor] = {}
    for key, value in source.model.state_dict().items():
        if not key.startswith(prefixes):
            tensor = cast(value, exporter.dtype)
            check_finite([(key, tensor)], source=origin, remedy=remedy)
            rest |= {key: tensor} if tensor is value else spool.keep({key: tensor})
    return ExportedModel(manifest=source.manifest, layers=layers, rest=rest, names=source.names, spool=spool)
