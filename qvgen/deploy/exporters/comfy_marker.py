"""The marker by which ComfyUI knows a layer's format: a small JSON text beside its weight, stored as a tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MARKER = "comfy_quant"
"""End of a marker's name."""


def marker_tensor(marker: Mapping[str, object]) -> Tensor:
    """A layer's marker, JSON in UTF-8, as uint8 [bytes].

    Example:
        >>> bytes(marker_tensor({"format": "int8_tensorwise"}).tolist())
        b'{"format": "int8_tensorwise"}'
    """
    return torch.tensor(list(json.dumps(marker).encode()), dtype=torch.uint8)


def read_marker(tensor: Tensor) -> dict[str, Any]:
    """Inverse of :func:`marker_tensor`."""
    marker: dict[str, Any] = json.loads(bytes(tensor.tolist()))
    return marker
