"""Where and how large: the card's device and the models' shapes, or, in a rehearsal, the CPU and tiny ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gpu.models import NAMES, Model, read_model
from qvgen_kernels import LinearSpec, available_kernels, get_backend

Row = dict[str, Any]
Case = tuple[str, Callable[[], Iterator[Row]]]
"""A label, and what measures: rows, as soon as each is known."""

MOST_VERSIONS = 64
"""Versions of one function that torch may compile."""

WIDTHS = ((8, 8), (4, 8), (4, 4), (3, 3))
"""Bits of weights and inputs that are measured."""


@dataclass(frozen=True)
class Setting:
    """Where a part runs.

    Attributes:
        rehearse: On the CPU, with Triton's interpreter and tiny shapes.
    """

    rehearse: bool

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return torch.device("cpu") if self.rehearse else torch.device("cuda", torch.cuda.current_device())

    def models(self) -> list[Model]:
        """The models that are measured; in a rehearsal one of each kind."""
        found = [read_model(name) for name in NAMES]
        return [model.shrunk() for model in found[:2]] if self.rehearse else found

    def compiled(self, function: Callable[..., Any], *, dynamic: bool = False) -> Callable[..., Any]:
        """A compiled function; in a rehearsal its graph is traced and run as it is."""
        # One function meets the shapes of all models in a process; at the usual limit of 8 a whole graph is an error.
        torch._dynamo.config.recompile_limit = MOST_VERSIONS
        backend = "eager" if self.rehearse else "inductor"
        return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)

    def kernels(self, spec: LinearSpec) -> list[str]:
        """Integer kernels for GPUs that run a layer here, the one that auto takes first."""
        if self.rehearse:
            return ["triton"]
        names = available_kernels(spec, device=self.device)
        return [name for name in names if "cuda" in getattr(get_backend(name), "device_types", ())]

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def card_name(setting: Setting) -> str:
    """The card's name."""
    return "rehearsal on the CPU" if setting.rehearse else torch.cuda.get_device_name(setting.device)
