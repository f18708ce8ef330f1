"""Reading single tensors of a folder's weights: what sets up one layer needs no model around it.

A safetensors file says where each tensor lies, so that nothing else of it is read. Values are copied: pages of a mapped file
would count as memory of the process for as long as the file is open.

LoRAs are added to each tensor as it is read, whole: rows of B A by themselves could have other last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qvgen.errors import UserError
from qvgen.models.base import TensorReader, VideoDiT
from qvgen.models.folder.safetensors_header import read_header
from qvgen.models.lora.merge import Lora, LoraMerge
from qvgen.quant.finite import check_finite


def tensor_reader_of(family: VideoDiT) -> TensorReader | None:
    """The reader of single tensors of a family's trained transformer; None where it has to be loaded whole."""
    make = getattr(family, "tensor_reader", None)
    return None if make is None else make()


class MergedReader:
    """A reader of single tensors with LoRAs in them, the bits of a model that is loaded whole.

    Args:
        read: Reads the tensors without them.
        merge: The LoRAs.
    """

    def __init__(self, read: TensorReader, merge: LoraMerge) -> None:
        self._read, self._merge = read, merge

    def __call__(self, name: str) -> Tensor:
        """A tensor in float32."""
        return self._merge.merged(name, self._read(name))

    def read_as(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor as a model has it that was loaded in a type: rounded to it before LoRAs are added, and behind that."""
        return self._merge.merged(name, self._read(name).to(dtype))


def with_loras(
    read: TensorReader, loras: Sequence[Lora], *, component: str, build: Callable[[], nn.Module]
) -> TensorReader:
    """Give a reader of single tensors with LoRAs in them.

    Args:
        read: Reads them without.
        loras: May be none.
        component: Which of the model's transformers it is.
        build: Makes the transformer, without weights.
    """
    if not loras:
        return read
    with torch.device("meta"):
        transformer = build()
    return MergedReader(read, LoraMerge(transformer, loras, component=component))


def read_as(read: TensorReader, name: str, dtype: torch.dtype) -> Tensor:
    """A tensor as a model has it that was loaded in a type."""
    return read.read_as(name, dtype) if isinstance(read, MergedReader) else read(name).to(dtype)


def read_tensors_of(files: Iterable[Path], *, remedy: str) -> TensorReader:
    """Give a reader of single tensors of a set of files, in float32; it may be called from several threads.

    Args:
        files: safetensors files that hold each tensor once.
        remedy: how to get the weights again, the end of a message.

    Raises:
        ValueError: A file is none. The reader raises it for a tensor that is not there, or not finite.
    """
    files = list(files)
    place = {name: file for file in files for name in read_header(file)[1]}

    def read(name: str) -> Tensor:
        if name not in place:
            raise UserError(f"{files[0].parent} lacks {name}; {remedy}")
        with safe_open(place[name], framework="pt") as content:
            value: Tensor = content.get_tensor(name).to(torch.float32, copy=True)
        check_finite([(name, value)], source=str(place[name]), remedy=remedy)
        return value

    return read
