"""The protocols of the targets of `qvgen export`, and what goes in and out of one.

    packed layers --fit--> exact, or why not     --tensors--> the target's tensors     --output--> the target's own arithmetic
    all tensors   --files--> the files that the runtime loads

A target is a leaf: one file here and one in conf/export. An :class:`Exporter` knows the format of another runtime and the
arithmetic that it executes, in plain torch, so that a parity report can hold the exported tensors to the packed model
(:mod:`qvgen.deploy.parity`). A :class:`PackedTarget` writes packed layers as they are, and qvgen itself runs them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from qvgen.deploy.manifest import Manifest
from qvgen.deploy.tensor_spool import TensorSpool
from qvgen.errors import UserError
from qvgen.layers.packed_linear import PackedLinear
from qvgen.models.original.names import OriginalNames

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
"""The file of weights in a folder of a diffusers transformer."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a target carries a packed layer.

    Attributes:
        weight: Reasons why the weight's codes are not carried as they are but quantized again; empty: they are carried.
        inputs: Reasons why inputs are quantized in another way than in training; empty: in the same way.
        runs_as: Bits of codes and inputs as the target executes them, for example ``w3a4``.
        quantizes_inputs: False where inputs stay as they are.
    """

    weight: tuple[str, ...]
    inputs: tuple[str, ...]
    runs_as: str
    quantizes_inputs: bool = True

    @property
    def reasons(self) -> tuple[str, ...]:
        """All that keeps the layer from being carried exactly."""
        return (*self.weight, *self.inputs)


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """All tensors of a model in a target's form.

    Attributes:
        manifest: The packed checkpoint's.
        layers: Layer -> what the target's ``tensors`` made of it, by the ends of their names.
        rest: All other tensors, by name, in the precision that the target writes.
        names: The original names; None where the family has none.
        spool: Keeps what files make of these tensors until the export is written.
    """

    manifest: Manifest
    layers: Mapping[str, Mapping[str, Tensor]]
    rest: Mapping[str, Tensor]
    names: OriginalNames | None
    spool: TensorSpool

    @property
    def all_tensors(self) -> dict[str, Tensor]:
        """Every tensor with its whole name, as diffusers names it."""
        flat = {f"{name}.{end}": tensor for name, ends in self.layers.items() for end, tensor in ends.items()}
        return {**self.rest, **flat}

    @property
    def other_matrices(self) -> list[str]:
        """Modules whose weight is a matrix that is not packed, in order: those that a format has to leave alone by name."""
        ends = (name for name, tensor in self.rest.items() if tensor.ndim == 2 and name.endswith(".weight"))
        return sorted(name.removesuffix(".weight") for name in ends)

    @property
    def diffusers_config(self) -> dict[str, Any]:
        """The content of a diffusers transformer's config.json."""
        import diffusers

        head = {"_class_name": self.manifest.transformer, "_diffusers_version": diffusers.__version__}
        return {**head, **self.manifest.transformer_config}


@dataclass(frozen=True, kw_only=True)
class ExportFile:
    """One file of an export.

    Attributes:
        path: Below the folder of the export.
        content: The file's bytes, the tensors of a safetensors file, or a file that is copied.
        metadata: Texts in the header of a safetensors file.
    """

    path: str
    content: bytes | Path | Mapping[str, Tensor]
    metadata: Mapping[str, str] | None = None


@runtime_checkable
class Target(Protocol):
    """The part of a target of `qvgen export` that all of them have; it is an :class:`Exporter` or a :class:`PackedTarget`.

    Attributes:
        runtime: The programs that load it, for messages and the report.
        profiles: Profiles of conf/profile that are trained for it, the first one first; empty: it takes them all.
        needs_original_names: Whether its files have the names of the model's own code.
        dtype: Precision of what is not quantized: float32, bfloat16 or float16; None: as in the packed checkpoint.
        bound: What the runtime's kernels do that this target's ``output`` does not, in one sentence; empty: nothing.
    """

    runtime: str
    profiles: Sequence[str]
    needs_original_names: bool
    dtype: str | None
    bound: str

    def fit(self, layer: PackedLinear) -> Fit:
        """Whether a layer is carried exactly; raises ValueError for one that can't be carried at all, and says why."""


@runtime_checkable
class Exporter(Target, Protocol):
    """A target in the format of another runtime."""

    def tensors(self, layer: PackedLinear) -> dict[str, Tensor]:
        """The layer's tensors as the target stores them, by the ends of their names (``weight``, ``bias``, ...)."""

    def output(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The layer's output as the runtime computes it from stored tensors and inputs float32 [M, K].

        Returns:
            float32 [M, N], or more columns where the format pads them.
        """

    def files(self, model: ExportedModel) -> list[ExportFile]:
        """All files of the model."""


@runtime_checkable
class HalfSums(Protocol):
    """A target whose kernels add in half precision: the report says what that changes, besides ``output``'s exact sums."""

    def half_output(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """As :meth:`Exporter.output`, every sum rounded as the kernels round it."""


@runtime_checkable
class PackedTarget(Target, Protocol):
    """A target whose layers stay as they are packed."""

    def packed_folder(self, manifest: Manifest) -> str:
        """Name of the folder below the export in which the packed model lies; "." where it is the export itself.

        Raises:
            ValueError: What the target was asked for does not fit the packed model.
        """

    def packed_files(self, packed: Path, manifest: Manifest) -> list[ExportFile]:
        """All files of a packed directory as the target has them."""


@runtime_checkable
class Publisher(Target, Protocol):
    """A target that can also upload what it wrote."""

    def check_upload(self) -> None:
        """Raise UserError where an upload was asked for that can't be made from here; called before anything else."""

    def publish(self, folder: Path) -> str:
        """Upload a written folder where that was asked for.

        Returns:
            A line that says where it is now; empty where no upload was asked for.
        """


def check_dtype(dtype: str | None) -> str | None:
    """Raise UserError for an unknown name of a precision; return it otherwise."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"export.dtype={dtype} is not among null, {', '.join(DTYPES)}")
    return dtype


def cast(tensor: Tensor, dtype: str | None) -> Tensor:
    """A floating-point tensor in a target's precision; any other, and with None every one, as it is."""
    return tensor.to(DTYPES[dtype]) if dtype is not None and tensor.is_floating_point() else tensor


def bias_tensor(layer: PackedLinear, dtype: str | None) -> dict[str, Tensor]:
    """The layer's bias under its name, if it has one."""
    return {} if layer.bias is None else {"bias": cast(layer.bias.detach(), dtype)}


def add_bias(y: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Y float32 [M, N] plus the stored bias, if there is one."""
    return y + tensors["bias"].float() if "bias" in tensors else y
