"""Weights that travel with the package: a safetensors file, and beside it a card that says where it came from.

    NAME.safetensors    tensors only, float32 or bfloat16
    NAME.json           the card: {"file", "sha256", "bytes", ...} and whatever its maker recorded (command, seed, quality)

A file is only loaded if its bytes have the card's sha256. Both are written whole or not at all, the card last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from qvgen.quant.finite import check_finite
from qvgen.run_directory import atomic_write

ASSETS_DIRECTORY = Path(__file__).resolve().parent / "assets"
"""Where the weights that the package ships lie."""

_REMEDY = "restore it from the package (pip install --force-reinstall qvgen, or git checkout) or train it anew"


def save_weights(
    tensors: Mapping[str, Tensor], path: Path | str, *, card: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> Path:
    """Write weights and their card.

    Args:
        tensors: name -> tensor; stored contiguous, on the CPU.
        path: ends in .safetensors; the card goes beside it.
        dtype: The type in which they are stored.
        card: plain values that say how the weights were made; "file", "sha256" and "bytes" are added.

    Returns:
        The weights' path.

    Raises:
        ValueError: when the path has another ending.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"weights path {path} must end in .safetensors")
    content = save({name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()})
    identity = {"file": path.name, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, content)
    atomic_write(path.with_suffix(".json"), (json.dumps({**card, **identity}, indent=2) + "\n").encode())
    return path


def load_weights(path: Path | str) -> dict[str, Tensor]:
    """Read weights whose checksum is right.

    Returns:
        name -> tensor on the CPU, in the type in which it was stored.

    Raises:
        ValueError: when weights or card are missing, the file's sha256 is not the card's, or a tensor is not finite.
    """
    path = Path(path)
    expected = read_card(path)["sha256"]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"weights {path} can't be read ({error.strerror}); {_REMEDY}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != expected:
        raise ValueError(f"weights {path} are corrupted: sha256 is {digest}, expected {expected}; {_REMEDY}")
    tensors: dict[str, Tensor] = load(content)
    check_finite(tensors.items(), source=f"weights {path}", remedy=_REMEDY)
    return tensors


def read_card(path: Path | str) -> dict[str, Any]:
    """Read the card beside a weights file.

    Raises:
        ValueError: when it is missing or is no card.
    """
    card_path = Path(path).with_suffix(".json")
    try:
        card = json.loads(card_path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"model card {card_path} can't be read ({error.strerror}); {_REMEDY}") from error
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"model card {card_path} is no JSON ({error}); {_REMEDY}") from error
    if not isinstance(card, dict) or not isinstance(card.get("sha256"), str):
        raise ValueError(f"model card {card_path} has no sha256; {_REMEDY}")
    return card


def check_state(module: torch.nn.Module, tensors: Mapping[str, Tensor], *, path: Path | str) -> None:
    """Refuse weights of another model, in one line instead of PyTorch's list.

    Raises:
        ValueError: naming the first tensor that is missing, unexpected or of another shape.
    """
    wanted = module.state_dict()
    for name in [*wanted, *tensors]:
        need = list(wanted[name].shape) if name in wanted else "no such tensor"
        have = list(tensors[name].shape) if name in tensors else "no such tensor"
        if need != have:
            raise ValueError(
                f"weights {path} are of another model: {name} is {have}, the configuration needs {need}; "
                "train anew after changing the sizes"
            )
