"""Keys of LoRA files as trainers write them, brought to the names of diffusers' transformers.

A key is PREFIXES NAME . KIND:

    prefixes   transformer. (diffusers, finetrainers, ai-toolkit), diffusion_model. (ComfyUI, diffusion-pipe, LightX2V),
               pipe.dit. (DiffSynth-Studio), base_model.model. (peft), lora_unet_ (musubi-tuner), or none
    name       diffusers' (blocks.0.attn1.to_q), the original code's (blocks.0.self_attn.q), or either with _ for every dot
    kind       lora_A.weight, lora_down.weight, lora_A.default.weight, ... and lora_B or lora_up   the product
               alpha                                                      its numerator: alpha / rank scales the product
               diff, diff_b, diff_m                                       added to weight, bias, modulation

Sources: diffusers 0.42, loaders/lora_conversion_utils.py (Wan); LightX2V's loader for diff_m. Unlike what diffusers'
converter takes, a file may have any subset of layers, and no key is left out: what matches nothing is an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from qvgen.models.original_names import LTX_ORIGINAL_NAMES, WAN_ORIGINAL_NAMES, OriginalNames, original_module_name

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
_NAMES: Mapping[str, OriginalNames] = {"LTXVideoTransformer3DModel": LTX_ORIGINAL_NAMES}
"""Class -> the original code's names; Wan's for all others."""


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


class LayerNames:
    """The names that a transformer's layers and parameters have in LoRA files.

    Args:
        transformer: A transformer of diffusers, on any device, ``meta`` too.
    """

    def __init__(self, transformer: nn.Module) -> None:
        places: set[str] = set()
        names = _NAMES.get(type(transformer).__name__, WAN_ORIGINAL_NAMES)
        for parameter, _ in transformer.named_parameters():
            module, _, last = parameter.rpartition(".")
            places.add(module if last in ("weight", "bias") else parameter)
        self._found = _without_doubles((alias, name) for name in places for alias in _aliases(name, names))

    def find(self, key: LoraKey) -> str | None:
        """Name of the module, or for ``diff_m`` of the parameter, that a key is about; None where there is none."""
        if key.kind != "diff_m":
            return self._found.get(key.name)
        return self._found.get(f"{key.name}.modulation") or self._found.get(f"{key.name}_modulation")


def _aliases(name: str, names: OriginalNames) -> set[str]:
    """A name, the original code's name of it, and both with _ for dots."""
    original = original_module_name(name, names)
    return {alias for dotted in (name, original) for alias in (dotted, dotted.replace(".", "_"))}


def _without_doubles(pairs: Iterable[tuple[str, str]]) -> Mapping[str, str]:
    """Aliases that mean one name alone."""
    unique = set(pairs)
    counts = Counter(alias for alias, _ in unique)
    return {alias: name for alias, name in unique if counts[alias] == 1}
