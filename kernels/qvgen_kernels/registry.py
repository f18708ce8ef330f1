"""Backends of the packed linear, by name. A backend registers itself when its module is imported.

Other packages bring backends by the entry point group ``qvgen_kernels.backends``; they are looked for at the first question:

    [project.entry-points."qvgen_kernels.backends"]
    fast = "qvgen_fast.backend"         the module registers the backend ``fast`` when it is imported

A backend that lies in no package is named by its class, ``kernel=mine.fast.FastBackend``, which is made without arguments.
Whoever passes such a name on has to know that a user wrote it: the class's code runs.

``auto`` takes the backend of the highest priority that accepts the layer on that device. An explicit name
never falls back to another one: it runs or says why it can't. A layer's weight is prepacked BY a backend, in
that backend's own order of bytes, so "auto" is resolved once, before prepacking, and the resolved name is
kept with the weight.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol

import torch
from torch import Tensor

from qvgen_kernels.contract import LinearSpec, LinearTensors
from qvgen_kernels.errors import KernelUnavailableError
from qvgen_kernels.weight import CanonicalWeight

__all__ = [
    "AUTO",
    "Backend",
    "available_kernels",
    "describe_choice",
    "get_backend",
    "kernel_names",
    "refusals",
    "register_backend",
    "resolve_kernel",
]

AUTO = "auto"
ENTRY_POINTS = "qvgen_kernels.backends"

_log = logging.getLogger(__name__)
_backends: dict[str, Backend] = {}
_made: dict[str, Backend] = {}
"""Backends of classes that were named in full, by that name; they are among ``_backends`` by their own."""


class Backend(Protocol):
    """The object that a backend's module makes and hands to :func:`register_backend`.

    Attributes:
        name: The name that a user writes as ``kernel=NAME``.
        priority: "auto" prefers the larger; the reference has 0. An attribute ``priority_on_cpu``, where there is one, counts
            instead of it there.

    An attribute ``cost``, where there is one, says in a few words what running on it costs; it is logged with the name. An
    attribute ``device_types``, where there is one, names those that it is written for; ``exact`` is False where outputs may
    differ from the reference's by more than the contract accepts of integer kernels. Methods that there may be:
    ``preferred(spec, device=...)``, asked where it does not refuse, puts it before those of higher priority;
    ``prepacked_bytes(spec)`` is the memory of a layer's prepacked weight, which is then counted and said.
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
    _load_installed()
    usable = [backend for backend in _backends.values() if backend.refusal(spec, device=device) is None]
    return [backend.name for backend in sorted(usable, key=lambda backend: _order(backend, spec, device))]


def _order(backend: Backend, spec: LinearSpec, device: torch.device) -> tuple[bool, int]:
    preferred = getattr(backend, "preferred", None)
    return preferred is None or not preferred(spec, device=device), -_priority(backend, device)


def _priority(backend: Backend, device: torch.device) -> int:
    on_cpu: int = getattr(backend, "priority_on_cpu", backend.priority)
    return on_cpu if device.type == "cpu" else backend.priority


def get_backend(name: str) -> Backend:
    """The backend of that name; "auto" is no backend.

    Raises:
        ValueError: unknown name, or "auto", which must be resolved before weights are prepacked.
    """
    if name == AUTO:
        raise ValueError("kernel='auto' is resolved once, before prepacking; use resolve_kernel('auto', spec).name")
    if "." in name:
        return _made.get(name) or _load_class(name)
    if name not in _backends and name in (failures := _load_installed()):
        raise ValueError(f"kernel={name!r} can't be used: {failures[name]}")
    if name not in _backends:
        raise ValueError(f"kernel={name!r} is unknown; use {AUTO} or one of {', '.join(_backends)}")
    return _backends[name]


def kernel_names() -> list[str]:
    """Names of all backends, ours and those of installed packages, whether they run here or not."""
    _load_installed()
    return list(_backends)


@cache
def _load_installed() -> dict[str, str]:
    """Import the backends that installed packages bring, once in a process.

    Returns:
        Name of each one that can't be used -> why, and what to do; it was warned of.
    """
    failures: dict[str, str] = {}
    points = {(point.name, point.value): point for point in entry_points(group=ENTRY_POINTS)}
    for (name, _), point in sorted(points.items()):
        package = point.dist.name if point.dist is not None else point.value
        try:
            _load(point)
        except Exception as error:  # the code of whoever wrote the package, which may raise anything
            text = " ".join(str(error).split())
            failures[name] = f"package {package}: {type(error).__name__}: {text}; repair or uninstall it"
            _log.warning("kernel %s of %s", name, failures[name])
    return failures


def _load(point: EntryPoint) -> None:
    before = dict(_backends)
    try:
        importlib.import_module(point.module)
        if point.name in before or point.name not in _backends:
            raise ValueError(f"{point.module} registers no backend named {point.name!r} of its own")
    except BaseException:
        _backends.clear()
        _backends.update(before)
        raise


def _load_class(name: str) -> Backend:
    """Make and register the backend of a class that a user wrote; the present folder is searched last."""
    module, _, class_name = name.rpartition(".")
    here = os.getcwd()
    if not sys.flags.safe_path and not {here, ""} & set(sys.path):
        sys.path.append(here)
    try:
        backend: Backend = getattr(importlib.import_module(module), class_name)()
    except Exception as error:  # the code of whoever wrote the class, which may raise anything
        text = " ".join(str(error).split())
        raise ValueError(
            f"kernel={name!r} can't be made: {type(error).__name__}: {text}; name a class that takes no arguments, in a "
            "module that Python finds from the present folder"
        ) from error
    members = ("name", "priority", "refusal", "prepack", "prepack_parts", "linear")
    if missing := [member for member in members if not hasattr(backend, member)]:
        raise ValueError(
            f"kernel={name!r} is no backend: it lacks {', '.join(missing)}; see qvgen_kernels.registry.Backend"
        )
    register_backend(backend)
    _made[name] = backend
    return backend


def refusals(spec: LinearSpec, *, device: torch.device | str = "cpu") -> dict[str, str]:
    """Backends that ``auto`` would prefer to the one it takes, and why they refuse; but those for other devices alone."""
    device = torch.device(device)
    taken = _priority(get_backend(available_kernels(spec, device=device)[0]), device)
    better = [backend for backend in _backends.values() if _priority(backend, device) > taken]
    found = {}
    for backend in sorted(better, key=lambda backend: -_priority(backend, device)):
        reason = backend.refusal(spec, device=device)
        if reason is not None and device.type in getattr(backend, "device_types", (device.type,)):
            found[backend.name] = reason
    return found


def describe_choice(specs: Mapping[LinearSpec, int], *, kernel: str = AUTO, device: torch.device | str = "cpu") -> str:
    """One line: what runs the layers of these specs on a device, what it costs, and why nothing faster does.

    Args:
        specs: How many layers there are of each.
        kernel: "auto" or a backend's name.
        device: Where their tensors live.

    Raises:
        RuntimeError: As :func:`resolve_kernel`.
    """
    device = torch.device(device)
    counts: Counter[str] = Counter()
    memory: Counter[str] = Counter()
    why: dict[str, None] = {}
    for spec, count in specs.items():
        backend = (
            get_backend(available_kernels(spec, device=device)[0])
            if kernel == AUTO
            else resolve_kernel(kernel, spec, device=device)
        )
        counts[backend.name] += count
        if (prepacked_bytes := getattr(backend, "prepacked_bytes", None)) is not None:
            memory[backend.name] += count * prepacked_bytes(spec)
        if kernel == AUTO and getattr(backend, "cost", None) is not None:
            why |= dict.fromkeys(f"{name}: {reason}" for name, reason in refusals(spec, device=device).items())
    parts = []
    for name, count in counts.items():
        cost = getattr(get_backend(name), "cost", None)
        notes = ", ".join(filter(None, (cost, _memory(memory.get(name)))))
        parts.append(f"{name}{f' for {count} layers' if len(counts) > 1 else ''}{f' ({notes})' if notes else ''}")
    none_here = any(getattr(get_backend(name), "cost", None) for name in counts)
    reasons = (
        f"; faster ones refuse: {'; '.join(why)}"
        if why
        else "; no faster one is written for this device"
        if none_here
        else ""
    )
    return f"kernel={kernel} on {device.type}: {', '.join(parts)}{reasons if kernel == AUTO else ''}"


def _memory(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 2**20:.0f} MiB of prepacked weights"


@cache
def _say_once(line: str) -> None:
    _log.warning("%s", line)


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
        if device.type not in ("cpu", "meta") and getattr(backend, "cost", None) is not None:
            _say_once(describe_choice({spec: 1}, device=device))
        return backend
    backend = get_backend(name)
    reason = backend.refusal(spec, device=device)
    if reason is not None:
        usable = ", ".join(available_kernels(spec, device=device))
        raise KernelUnavailableError(
            f"kernel={name!r} can't run this layer on {device}: {reason}; use kernel=auto or {usable}"
        )
    return backend
