"""Keys of LoRA files as trainers write them, brought to the names of diffusers' transformers.

A key is PREFIXES NAME . KIND:

    prefixes   transformer. (diffusers, finetrainers, ai-toolkit), diffusion_model. (ComfyUI, diffusion-pipe, LightX2V),
               pipe.dit. (DiffSynth-Studio), base_model.model. (peft), lora_unet_ (musubi-tuner), or none
    name       diffusers' (blocks.0.attn1.to_q), the original code's (blocks.0.self_attn.q), ComfyUI's where it renames
               (double_blocks.0.img_attn.qkv), or one of them with _ for every dot. A layer that the original code has fused
               is several of diffusers', and each takes its rows of B
    kind       lora_A.weight, lora_down.weight, lora_A.default.weight, ... and lora_B or lora_up   the product
               alpha                                                      its numerator: alpha / rank scales the product
               diff, diff_b, diff_m                                       added to weight, bias, modulation

Sources: diffusers 0.42, loaders/lora_conversion_utils.py (Wan); LightX2V's loader for diff_m. Unlike what diffusers'
converter takes, a file may have any subset of layers, and no key is left out: what matches nothing is an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from torch import Tensor, nn

from qvgen.models.original.names import (
    ORIGINAL_NAMES,
    OriginalNames,
    apart_name,
    comfy_names,
    fused_layer,
    has_swapped_halves,
    original_module_name,
)
from qvgen.models.original.tensors import swap_halves

Kind = Literal["down", "up", "bias", "alpha", "diff", "diff_b", "diff_m"]

_KIND = re.compile(
    r"^(?P<name>.+?)\.(?:"
    r"(?:lora_(?P<half>A|B|down|up)|lora\.(?P<old>down|up))(?:\.(?!weight$|bias$)\w+)?(?:\.(?P<what>weight|bias))?"
    r"|(?P<other>alpha|diff|diff_b|diff_m))$"
)
_PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "pipe.dit.", "pipe.dit2.", "transformer_2.",
    "transformer.", "lora_unet_", "lora_transformer_", "module.", "model.",
)  # fmt: skip
_SECOND = ("transformer_2.", "pipe.dit2.")
"""Prefixes of Wan2.2's low-noise transformer."""


@dataclass(frozen=True, kw_only=True)
class LoraKey:
    """A key taken apart.

    Attributes:
        key: The key as it stands in the file.
        name: Name of the layer, without prefixes; not yet one of the transformer's.
        kind: what the tensor is.
        second: whether a prefix says that it is of the low-noise transformer; None: no prefix says which.
    """

    key: str
    name: str
    kind: Kind
    second: bool | None


def read_key(key: str) -> LoraKey | None:
    """Take a key apart; None for one that is no LoRA's."""
    rest, second = key, None
    while prefix := next((prefix for prefix in _PREFIXES if rest.startswith(prefix)), None):
        if prefix in ("transformer.", "pipe.dit.", *_SECOND):
            second = bool(second) or prefix in _SECOND
        rest = rest.removeprefix(prefix)
    match = _KIND.match(rest)
    if not match:
        return None
    half, what = match["half"] or match["old"], match["what"]
    kind: Kind
    if half is None:
        kind = match["other"]  # type: ignore[assignment] # the expression allows the four
    elif what == "bias":
        if half in ("A", "down"):
            return None
        kind = "bias"
    else:
        kind = "down" if half in ("A", "down") else "up"
    return LoraKey(key=key, name=match["name"], kind=kind, second=second)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A layer or parameter of a transformer, and what of a file's tensor is its own.

    Attributes:
        name: Name of the module, or of a parameter of no module of its own.
        rows: First row and the one after the last, of a layer that the file has fused with others; None: all rows.
        of_rows: Rows of the fused layer; None: of the layer itself.
        swapped: Whether the two halves of the rows stand the other way round in the file.
    """

    name: str
    rows: tuple[int, int] | None = None
    of_rows: int | None = None
    swapped: bool = False

    def take(self, tensor: Tensor) -> Tensor:
        """Take the layer's own rows out of a tensor [rows, ...] of the file."""
        own = tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]
        return swap_halves(own) if self.swapped else own


class LayerNames:
    """The names that a transformer's layers and parameters have in LoRA files.

    Args:
        transformer: A transformer of diffusers, on any device, ``meta`` too.
    """

    def __init__(self, transformer: nn.Module) -> None:
        rows: dict[str, int] = {}
        for parameter, value in transformer.named_parameters():
            module, _, last = parameter.rpartition(".")
            rows[module if last in ("weight", "bias") else parameter] = len(value) if value.ndim else 1
        self._found = _without_doubles(_places(rows, ORIGINAL_NAMES.get(type(transformer).__name__)))

    def find(self, key: LoraKey) -> Sequence[Place]:
        """The modules, or for ``diff_m`` the parameter, that a key is about; none where there is none."""
        if key.kind != "diff_m":
            return self._found.get(key.name, ())
        return self._found.get(f"{key.name}.modulation") or self._found.get(f"{key.name}_modulation") or ()


def _places(rows: Mapping[str, int], names: OriginalNames | None) -> Iterator[tuple[str, tuple[Place, ...]]]:
    """Every name that a file may have for a module or lone parameter, with what it means.

    Args:
        rows: Name in the transformer -> how many rows it has.
        names: The original code's names; None: they are diffusers'.
    """
    fused: dict[str, dict[str, str]] = {}
    orders: dict[str, Sequence[str]] = {}
    for name in rows:
        yield from ((alias, (Place(name=name),)) for alias in _spellings({name}))
        if names is None:
            continue
        layer, part, parts = fused_layer(original_module_name(name, names), names)
        if part:
            fused.setdefault(layer, {})[part] = name
            orders[layer] = parts
            if (apart := apart_name(f"{layer}.{part}", names)) is not None:
                yield from ((alias, (Place(name=name),)) for alias in _spellings({apart}))
        else:
            place = Place(name=name, swapped=has_swapped_halves(layer, names))
            yield from ((alias, (place,)) for alias in _spellings(_original_names(layer, names)))
    for layer, found in fused.items():
        own = [found[part] for part in orders[layer] if part in found]
        ends = list(accumulate(rows[name] for name in own))
        places = tuple(
            Place(name=name, rows=(end - rows[name], end), of_rows=ends[-1])
            for name, end in zip(own, ends, strict=True)
        )
        yield from ((alias, places) for alias in _spellings(_original_names(layer, names)))


def _original_names(layer: str, names: OriginalNames) -> set[str]:
    """The original name of a layer, and those that ComfyUI has for it."""
    return {layer, *(name.rpartition(".")[0] for name in comfy_names(f"{layer}.weight", names))}


def _spellings(names: Iterable[str]) -> set[str]:
    """Names as they are, and with _ for every dot."""
    return {spelling for name in names for spelling in (name, name.replace(".", "_"))}


def _without_doubles(pairs: Iterable[tuple[str, tuple[Place, ...]]]) -> Mapping[str, Sequence[Place]]:
    """Aliases that mean one thing alone."""
    unique = set(pairs)
    counts = Counter(alias for alias, _ in unique)
    return {alias: places for alias, places in unique if counts[alias] == 1}
