"""Whether the weights of a loaded module are finite; refused by the name of the tensor and of its file."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from safetensors import safe_open
from torch import nn

from qvgen.quant.finite import check_finite, is_finite


def check_finite_weights(module: nn.Module, *, files: Iterable[Path], remedy: str) -> None:
    """Look at all parameters and buffers of a module as they were loaded, in the dtype that they have now.

    Args:
        module: whose weights were read from ``files``.
        files: safetensors files of one folder.
        remedy: how to get the weights again, the end of the message.

    Raises:
        ValueError: names the first tensor with a NaN or an infinity, and the file that holds it.
    """
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if is_finite(tensor):
            continue
        paths = list(files)
        place = next((path for path in paths if _holds(path, name)), paths[0].parent)
        also = "" if tensor.dtype.itemsize > 2 else f"choose a dtype of more range than {tensor.dtype}, or "
        check_finite([(name, tensor)], source=str(place), remedy=also + remedy)


def _holds(path: Path, name: str) -> bool:
    with safe_open(path, framework="pt") as content:
        return name in content.keys()  # noqa: SIM118 - a safetensors file is no mapping
