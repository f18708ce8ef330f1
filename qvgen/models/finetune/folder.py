"""A finetune's folder: config.json and safetensors, as ``save_pretrained`` of a transformer leaves them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qvgen.models.finetune.base import AGAIN, Finetune
from qvgen.models.folder.hub_folder import HubFolder
from qvgen.models.folder.safetensors_header import read_header
from qvgen.models.folder.transformer_build import check_numbers, check_weights


@dataclass(frozen=True, kw_only=True)
class LoneFolder(HubFolder):
    """A transformer's folder, whose only component is itself."""

    def __post_init__(self) -> None:
        self.read_json("config.json")

    def remedy(self, part: str) -> str:
        """The remedy when something is not there: nothing is known of where it came from."""
        return f"{AGAIN}: its {part.removeprefix('./')} is not as it was saved"

    def shapes(self) -> dict[str, list[int]]:
        """Shapes of all tensors, by name, from headers."""
        return {
            name: entry["shape"] for file in self._weights(".").files for name, entry in read_header(file)[1].items()
        }

    def size(self) -> int:
        """Bytes of the weights."""
        return sum(file.stat().st_size for file in self._weights(".").files)


@dataclass(frozen=True, kw_only=True)
class FinetuneFolder(Finetune):
    """A transformer's folder.

    Raises:
        ValueError: Its weights are missing, damaged or quantized already, or its configuration asks for more than they hold.
    """

    folder: LoneFolder
    given: str

    def __post_init__(self) -> None:
        shapes = self.folder.shapes()
        try:
            check_numbers(self.folder.read_json("config.json"), num_tensors=len(shapes))
        except ValueError as error:
            raise ValueError(f"{self.given}: its config.json {error}; {AGAIN}") from error

    def config(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """See :class:`Finetune`."""
        del base
        return self.folder.read_json("config.json")

    @property
    def revision(self) -> str:
        """See :class:`Finetune`."""
        return self.folder.revision(".")

    @property
    def checksum(self) -> str:
        """See :class:`Finetune`."""
        return self.folder.checksum(".")

    def check(self, class_name: str, base: Mapping[str, Any]) -> None:
        """See :class:`Finetune`."""
        try:
            check_weights(class_name, self.config(base), self.folder.shapes(), size=self.folder.size())
        except ValueError as error:
            raise ValueError(f"{self.given} {error}; choose the model that it was made from, or {AGAIN}") from error

    def load(self, class_name: str, base: Mapping[str, Any], *, dtype: torch.dtype) -> nn.Module:
        """See :class:`Finetune`."""
        self.check(class_name, base)
        import diffusers

        return self.folder.load(".", getattr(diffusers, class_name), dtype=dtype)
