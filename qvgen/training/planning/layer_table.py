"""What a plan says of layers and disk: names collapsed by pattern, and the bytes that files take."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qvgen.data.source import DataSource
from qvgen.layers.layer_form import LayerForm
from qvgen.layers.packed_linear import PackedLinear
from qvgen.layers.swap import quantized_layers
from qvgen.training.planning.stored_state import StoredState


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Linears of one name, but for the block's number, and one shape.

    Attributes:
        pattern: The name, with ``*`` for the block's number.
        count: How many.
        out_features: N.
        in_features: K.
    """

    pattern: str
    count: int
    out_features: int
    in_features: int

    @property
    def weights(self) -> int:
        """Of all of them."""
        return self.count * self.out_features * self.in_features


@dataclass(frozen=True, kw_only=True)
class DiskPart:
    """One kind of file.

    Attributes:
        name: For people.
        nbytes: Of all of them.
        note: What the number is made of.
    """

    name: str
    nbytes: int
    note: str


def collapse(model: nn.Module, names: Sequence[str]) -> list[LayerGroup]:
    """Linears by pattern, in the model's order.

    Example:
        >>> blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)) for _ in range(4))
        >>> [(group.pattern, group.count) for group in collapse(blocks, ["0.0", "0.1", "1.0", "1.1"])]
        [('*.0', 2), ('*.1', 2)]
    """
    counts: dict[tuple[str, int, int], int] = {}
    for name in names:
        parts = name.split(".")
        index = next((index for index, part in enumerate(parts) if part.isdigit()), None)
        if index is not None:
            parts[index] = "*"
        layer: Any = model.get_submodule(name)
        key = (".".join(parts), layer.out_features, layer.in_features)
        counts[key] = counts.get(key, 0) + 1
    return [
        LayerGroup(pattern=pattern, count=count, out_features=rows, in_features=columns)
        for (pattern, rows, columns), count in counts.items()
    ]


def state_bytes(model: nn.Module) -> int:
    """Bytes of all tensors of a state dict."""
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def packed_bytes(student: nn.Module, *, phi_kept_rank: int = 0) -> int:
    """Bytes of the tensors of the packed checkpoint that a student is folded to, its Phi of a kept rank then."""
    layers = quantized_layers(student)
    packed = sum(
        PackedLinear(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            form=LayerForm.folded(layer, phi_rank=phi_kept_rank),
            noise_band=layer.noise_band,
            device="meta",
        ).nbytes()
        for layer in layers.values()
    )
    return packed + state_bytes(student) - sum(state_bytes(layer) for layer in layers.values())


def checkpoint_bytes(student: nn.Module, *, stored: StoredState | None = None) -> int:
    """Of one training checkpoint: the student's state and the optimizer's, and an average if there is one."""
    stored = stored or StoredState()
    parameters = stored.master_bytes(student) - sum(parameter.nbytes for parameter in student.parameters())
    return state_bytes(student) + parameters + stored.moment_bytes(student) + stored.average_bytes(student)


def run_files(
    student: nn.Module,
    *,
    checkpoints_kept: int,
    is_packed: bool,
    phi_kept_rank: int = 0,
    stored: StoredState | None = None,
) -> list[DiskPart]:
    """What a run writes to its folder, besides videos, logs and the report.

    Args:
        student: On the meta device.
        checkpoints_kept: How many of the newest checkpoints are kept.
        is_packed: Whether the result is folded and packed.
        phi_kept_rank: Rank of the Phi that stays in it.
        stored: Types of the run's state; None: float32 throughout.
    """
    checkpoint = checkpoint_bytes(student, stored=stored)
    files = checkpoints_kept + 1
    average = ", average" if stored is not None and stored.has_average else ""
    parts = [
        DiskPart(
            name="checkpoints",
            nbytes=files * checkpoint,
            note=f"{checkpoints_kept} kept and the one that is written: masters, moments{average}",
        ),
        DiskPart(name="start.safetensors", nbytes=state_bytes(student), note="what training starts from"),
    ]
    if is_packed:
        packed = packed_bytes(student, phi_kept_rank=phi_kept_rank)
        parts.append(DiskPart(name="packed", nbytes=packed, note="codes, scales, all other weights"))
    return parts


def cache_bytes(data: DataSource | None, family: Any) -> tuple[int, int] | None:
    """Bytes of a clip's latents and of a caption's embeddings in the cache; None for data or a family without one.

    An encoder in half precision leaves its output in half precision, which the cache stores as such.
    """
    if not hasattr(family, "vae_dtype") or not hasattr(data, "cut_settings"):
        return None
    latents = math.prod(family.sample_shape) * _item_bytes(family.vae_dtype)
    told = (family.condition_shape, *getattr(family, "further_condition_shapes", {}).values())
    return latents, sum(map(math.prod, told)) * _item_bytes(family.text_encoder_dtype)


def cache_files(data: DataSource | None, family: Any, *, num_clips: int | None) -> list[DiskPart]:
    """The cache of latents and embeddings: of all clips, each with a caption of its own, or of one."""
    per_clip = cache_bytes(data, family)
    if per_clip is None:
        return []
    latents, text = per_clip
    clips = 1 if num_clips is None else num_clips
    of = "per clip" if num_clips is None else f"{num_clips} clips"
    shape = " x ".join(map(str, family.sample_shape))
    tokens = " x ".join(map(str, family.condition_shape))
    return [
        DiskPart(name="latent cache", nbytes=clips * latents, note=f"{of}, {shape} in {family.vae_dtype}"),
        DiskPart(name="caption cache", nbytes=clips * text, note=f"{of}, {tokens} in {family.text_encoder_dtype}"),
    ]


def free_bytes(directory: Path) -> int:
    """Bytes that are free on the disk of a folder, which need not be there yet."""
    there = directory.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def _item_bytes(dtype: str) -> int:
    size: int = getattr(torch, dtype).itemsize
    return size
