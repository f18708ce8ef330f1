"""Backends of the packed linear, by name. A backend registers itself when its module is imported.

``auto`` takes the backend of the highest priority that accepts the layer on that device. An explicit name
never falls back to another one: it runs or says why it can't. A layer's weight is prepacked BY a backend, in
that backend's own order of bytes, so "auto" is resolved once, before prepacking, and the resolved name is
kept with the weight.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from qvgen_kernels.contract import LinearSpec, LinearTensors
from qvgen_kernels.errors import KernelUnavailableError
from qvgen_kernels.weight import CanonicalWeight

__all__ = ["AUTO", "Backend", "available_kernels", "get_backend", "register_backend", "resolve_kernel"]

AUTO = "auto"

_log = logging.getLogger(__name__)
_backends: dict[str, Backend] = {}


class Backend(Protocol):
    """What a backend module must provide: one object of this shape, handed to :func:`register_backend`.

    Attributes:
        name: what a user writes as ``kernel=name``.
        priority: "auto" prefers the larger; the reference has 0.
    """

    name: str
    priority: int

    def refusal(self, spec: LinearSpec, *, device: torch.device) -> str | None:
        """Why this spec can't run on this machine, in a sentence that names what was found; None = it can."""

    def prepack(
        self, planes: Sequence[Tensor], *, scale: Tensor, zero_point: Tensor | None, spec: LinearSpec
    ) -> list[Tensor]:
        """Turn canonical tensors (checked by ``weight.check_weight``) into this backend's own; at load."""

    def prepack_parts(self, parts: Sequence[CanonicalWeight], *, spec: LinearSpec) -> list[Tensor]:
        """The same for layers of one input as one; ``weight.CanonicalPrepack`` gives both."""

    def linear(self, x: Tensor, weight: Sequence[Tensor], *, tensors: LinearTensors, spec: LinearSpec) -> Tensor:
        """Map x [M, K] (any strides, M may be 0) to a new tensor [M, N] of x's dtype."""


def register_backend(backend: Backend) -> None:
    """Make a backend known under its name.

    Raises:
        ValueError: the name is taken or reserved.
    """
    if backend.name in _backends or backend.name == AUTO:
        raise ValueError(f"kernel name {backend.name!r} is taken; choose another name than {[*_backends, AUTO]}")
    _backends[backend.name] = backend


def available_kernels(spec: LinearSpec, *, device: torch.device | str = "cpu") -> list[str]:
    """Names of the backends that run this spec on this device, best first."""
    device = torch.device(device)
    usable = [backend for backend in _backends.values() if backend.refusal(spec, device=device) is None]
    return [backend.name for backend in sorted(usable, key=lambda backend: -backend.priority)]


def get_backend(name: str) -> Backend:
    """The backend of that name; "auto" is no backend.

    Raises:
        ValueError: unknown name, or "auto", which must be resolved before weights are prepacked.
    """
    if name == AUTO:
        raise ValueError("kernel='auto' is resolved once, before prepacking; use resolve_kernel('auto', spec).name")
    if name not in _backends:
        raise ValueError(f"kernel={name!r} is unknown; use {AUTO} or one of {', '.join(_backends)}")
    return _backends[name]


def resolve_kernel(name: str, spec: LinearSpec, *, device: torch.device | str = "cpu") -> Backend:
    """The backend that a layer will run on.

    Args:
        name: "auto" or a backend's name.
        spec: the layer.
        device: where its tensors live.

    Raises:
        ValueError: unknown name.
        RuntimeError: the named backend can't run this layer here. It never falls back to another one.
    """
    device = torch.device(device)
    if name == AUTO:
        backend = get_backend(available_kernels(spec, device=device)[0])
        _log.debug("kernel=auto: %s for %s on %s", backend.name, spec.to_string(), device)
        return backend
    backend = get_backend(name)
    reason = backend.refusal(spec, device=device)
    if reason is not None:
        usable = ", ".join(available_kernels(spec, device=device))
        raise KernelUnavailableError(
            f"kernel={name!r} can't run this layer on {device}: {reason}; use kernel=auto or {usable}"
        )
    return backend
