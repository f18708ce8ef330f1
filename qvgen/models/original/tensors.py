"""Tensors of diffusers' transformers -> those of the original code (:mod:`qvgen.models.original.names`), and back.

Rows of a weight go with rows of its scales and its bias, so that layers with one scale for each row are fused exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from qvgen.errors import UserError
from qvgen.models.original.names import (
    OriginalNames,
    apart_name,
    comfy_names,
    fused_layer,
    has_swapped_halves,
    original_names,
)


def original_sources(keys: Iterable[str], names: OriginalNames) -> dict[str, tuple[str, ...]]:
    """Original key -> the keys of diffusers whose rows it holds, in their order; one key where nothing is fused.

    Example:
        >>> from qvgen.models.original.names import HUNYUAN_VIDEO_ORIGINAL_NAMES
        >>> keys = [f"transformer_blocks.0.attn.to_{part}.bias" for part in "vqk"]
        >>> original_sources(keys, HUNYUAN_VIDEO_ORIGINAL_NAMES)["double_blocks.0.img_attn_qkv.bias"]
        ('transformer_blocks.0.attn.to_q.bias', 'transformer_blocks.0.attn.to_k.bias', 'transformer_blocks.0.attn.to_v.bias')

    Raises:
        UserError: Two keys have the same original name, or a part of a fused layer is missing.
    """
    found: dict[str, dict[str, str]] = {}
    wanted: dict[str, Sequence[str]] = {}
    for key, name in original_names(keys, names).items():
        module, dot, end = name.rpartition(".")
        layer, part, parts = fused_layer(module, names)
        whole = f"{layer}{dot}{end}"
        found.setdefault(whole, {})[part] = key
        wanted[whole] = parts if part else ("",)
    for whole, parts in found.items():
        if missing := [part for part in wanted[whole] if part not in parts]:
            raise UserError(
                f"{names.code}'s own code has {', '.join(wanted[whole])} as one tensor {whole!r}, and here is "
                f"{next(iter(parts.values()))!r} and nothing for {', '.join(missing)}"
            )
    return {whole: tuple(parts[part] for part in wanted[whole]) for whole, parts in found.items()}


def join_original(whole: str, parts: Sequence[Tensor], names: OriginalNames) -> Tensor:
    """The tensor of an original key, of the tensors [rows, ...] of :func:`original_sources`; a lone one is itself."""
    joined = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return swap_halves(joined) if _is_swapped(whole, names) else joined


def from_original(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], names: OriginalNames
) -> dict[str, Tensor]:
    """Tensors of a file with original names, or ComfyUI's, under diffusers' names; unknown ones keep the name that they have.

    Args:
        state: The file's.
        expected: A transformer's state, on any device, ``meta`` too.
        names: The original names.

    Raises:
        ValueError: A fused tensor has another number of rows, or one tensor is there under both names; the message is a
            clause that follows on the file's name.
    """
    sources, rest, found = original_sources(expected, names), {}, {}
    known = {name: whole for whole in sources for name in (*comfy_names(whole, names), whole)}
    known |= _apart(expected, names)
    for name, value in state.items():
        if (whole := known.get(name, name)) in rest:
            raise ValueError(f"holds {name!r} under this name and under another one of the same tensor")
        rest[whole] = value
    for whole, keys in sources.items():
        if whole in rest:
            parts = _split(whole, rest.pop(whole), [expected[key] for key in keys], names)
            found |= dict(zip(keys, parts, strict=True))
    if both := [name for name in rest if name in found]:
        raise ValueError(f"holds {both[0]!r} under this name of diffusers and under the original one")
    return {**rest, **found}


def _apart(keys: Iterable[str], names: OriginalNames) -> dict[str, str]:
    """Name of a tensor in files that fuse nothing -> key of diffusers, of the parts of fused layers."""
    found = {}
    for key, name in original_names(keys, names).items():
        module, dot, end = name.rpartition(".")
        if (apart := apart_name(module, names)) is not None:
            found[f"{apart}{dot}{end}"] = key
    return found


def _split(whole: str, tensor: Tensor, like: Sequence[Tensor], names: OriginalNames) -> list[Tensor]:
    """The way back of :func:`join_original`: views, and a copy where halves are swapped."""
    if len(like) == 1:
        return [swap_halves(tensor) if _is_swapped(whole, names) else tensor]
    rows = [len(part) for part in like]
    if tensor.ndim == 0 or len(tensor) != sum(rows):
        raise ValueError(f"holds {whole!r} of shape {list(tensor.shape)}, and the model's has {sum(rows)} rows")
    return list(tensor.split(rows))


def _is_swapped(whole: str, names: OriginalNames) -> bool:
    return has_swapped_halves(whole.rpartition(".")[0], names)


def swap_halves(tensor: Tensor) -> Tensor:
    """Exchange the two halves of the rows of a tensor [rows, ...]."""
    return torch.cat(tensor.chunk(2)[::-1])
