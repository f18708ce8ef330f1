"""A finetune of a transformer alone: what its two forms, a folder and a file, have in common."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

AGAIN = "get the finetune again"
"""The end of a message about one that is damaged."""


class Finetune(abc.ABC):
    """The weights of a transformer, and its configuration."""

    @abc.abstractmethod
    def config(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """The transformer's configuration; ``base`` is the base model's."""

    @property
    @abc.abstractmethod
    def revision(self) -> str:
        """Content key, told in milliseconds; see :mod:`qvgen.models.folder.hub_folder`."""

    @property
    @abc.abstractmethod
    def checksum(self) -> str:
        """SHA-256 of everything that :meth:`load` reads."""

    @abc.abstractmethod
    def check(self, class_name: str, base: Mapping[str, Any]) -> None:
        """Find out from headers whether it is whole and of the model; raises ValueError."""

    @abc.abstractmethod
    def load(self, class_name: str, base: Mapping[str, Any], *, dtype: torch.dtype) -> nn.Module:
        """The transformer in eval mode, without gradients, on the CPU, as :meth:`HubFolder.load` gives one.

        Raises:
            ValueError: It is damaged, quantized already or of another model.
        """
