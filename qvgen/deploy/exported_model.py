"""A packed checkpoint in the form of a target: checked whole, its layers held to what the target can carry, then converted.

Nothing is written here. Layers are read from the mapped file one after another; what is built is as large as the export.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from qvgen.deploy.exporters.base import ExportedModel, Exporter, Fit, cast
from qvgen.deploy.manifest import WEIGHTS_FILE, Manifest, read_manifest
from qvgen.deploy.packed_file import StageClock, file_checked, map_tensors
from qvgen.deploy.packed_model import build_packed, check_values
from qvgen.errors import UserError
from qvgen.layers.packed_linear import PackedLinear
from qvgen.models.original_names import OriginalNames
from qvgen.quant.finite import check_finite

NO_NAMES = "name its family when it is saved (base_name=...), or choose another target"


@dataclass(frozen=True, kw_only=True)
class PackedSource:
    """A packed checkpoint that was read whole and is right.

    Attributes:
        directory: Its folder.
        manifest: Its manifest.
        model: The transformer with packed layers, not fused, on the CPU.
        names: Rules to the original names of its family; None where it has none.
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


def find_fits(source: PackedSource, exporter: Exporter) -> dict[str, Fit]:
    """How the target carries each layer.

    Raises:
        UserError: A layer that it can't carry at all, by name; or it needs original names and the family has none.
    """
    if exporter.needs_original_names and source.names is None:
        name = source.manifest.base_name
        family = f"{name!r} has none" if name else f"the checkpoint does not say of which family it is; {NO_NAMES}"
        raise UserError(
            f"{exporter.runtime} reads files with the names of the model's own code, and "
            f"{family if not name else f'{family}: {exporter.runtime} has no such model'}"
        )
    fits = {}
    for name, layer in source.layers.items():
        try:
            fits[name] = exporter.fit(layer)
        except ValueError as error:
            raise UserError(f"{exporter.runtime} can't carry {name!r}: {error}") from error
    return fits


def convert(source: PackedSource, exporter: Exporter) -> ExportedModel:
    """All tensors in the target's form.

    Raises:
        ValueError: A value that is no longer finite in the target's precision, by name.
    """
    packed = source.layers
    layers: Mapping[str, Mapping[str, Tensor]] = {name: exporter.tensors(layer) for name, layer in packed.items()}
    prefixes = tuple(f"{name}." for name in packed)
    rest = {
        key: cast(value, exporter.dtype)
        for key, value in source.model.state_dict().items()
        if not key.startswith(prefixes)
    }
    model = ExportedModel(manifest=source.manifest, layers=layers, rest=rest, names=source.names)
    remedy = f"it does not fit into {exporter.dtype}; write export.dtype=float32"
    check_finite(model.all_tensors.items(), source=f"{source.directory / WEIGHTS_FILE}, exported", remedy=remedy)
    return model
