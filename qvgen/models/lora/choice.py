"""``model.lora`` and ``model.lora_scale`` as they are written: one LoRA, or a list of them.

=======================================  ======================  ==========================
``lora``                                 ``lora_scale``          the scale is of
=======================================  ======================  ==========================
FILE                                     0.8                     the one
[FILE, FILE]                             0.8                     each
[FILE, FILE]                             [0.8, 1.0]              the first, the second
[{path: FILE, scale: 0.8}, FILE]         1.0                     those that say none
=======================================  ======================  ==========================
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Scale = float | Sequence[float]


def read_choice(value: Any, *, scale: Any, key: str = "model.lora") -> list[tuple[Path, float]]:
    """Paths and scales of the LoRAs.

    Args:
        value: what the key holds: nothing, a path, a mapping of path and scale, or a list of these.
        scale: ``model.lora_scale``: a finite number, or a list with one for each LoRA; unused without any LoRA.
        key: the key, for messages.

    Returns:
        (path, scale) of each, in order.

    Raises:
        ValueError: it is something else, or scales are not finite, or not as many as LoRAs.

    Example:
        >>> read_choice(["a", {"path": "b", "scale": 0.5}], scale=2)
        [(PosixPath('a'), 2.0), (PosixPath('b'), 0.5)]
    """
    entries = value if isinstance(value, list | tuple) else [] if value is None else [value]
    scales = list(scale) if isinstance(scale, list | tuple) else None
    for number in [scale] if scales is None else scales:
        _number(number, key="model.lora_scale")
    if scales is not None and entries and len(scales) != len(entries):
        raise ValueError(
            f"model.lora_scale={scales} has {len(scales)} scales for {len(entries)} LoRAs; give one for each"
        )
    choices = []
    for index, entry in enumerate(entries):
        path, own = entry, None
        if isinstance(entry, Mapping):
            if not {"path"} <= set(entry) <= {"path", "scale"}:
                raise ValueError(f"{key}={dict(entry)} has the keys {', '.join(map(str, entry))}; write path and scale")
            path, own = entry["path"], entry.get("scale")
        if not isinstance(path, str | Path) or not str(path):
            raise ValueError(f"{key}={value} is no path, and no list of paths; write {key}=FILE.safetensors")
        if own is not None and scales is not None:
            raise ValueError(f"{key} and model.lora_scale={scales} both give the scale of {path}; write it once")
        chosen = own if own is not None else scale if scales is None else scales[index]
        choices.append(
            (Path(path).expanduser(), _number(chosen, key="model.lora_scale" if own is None else f"{key}.scale"))
        )
    return choices


def _number(value: Any, *, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key}={value} is no finite number; write 1.0 for the LoRA as it is")
    return float(value)
