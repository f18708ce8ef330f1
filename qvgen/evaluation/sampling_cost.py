"""The cost of sampling with one model: seconds, and memory besides its weights.

    GPU          the allocator's peak of what torch holds there, less what lay there before; one model is there at a time
    Linux        the peak of the process's resident memory (VmHWM, which /proc/self/clear_refs sets back), less what was
                 resident before. Freed memory is given back to the system first, so that a model does not seem to need
                 less because another one was measured before it. Pages of 4 kB, and whatever else the process does meanwhile.
    elsewhere    not measured

Both see workspaces inside of operators, which counting tensors does not (:mod:`qvgen.training.planning.live_bytes`).
Several models lie in the process's memory at once, so weights are counted by themselves: every tensor that a
module holds, a storage once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qvgen.deploy.memory_return import return_freed_memory

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(kw_only=True)
class Spent:
    """The cost of what runs inside of :func:`measured`; known when that ends.

    Attributes:
        seconds: Wall clock.
        working_bytes: Largest memory that was taken besides what was held before; None where it cannot be measured.
    """

    seconds: float = 0.0
    working_bytes: int | None = None


@contextmanager
def measured(device: torch.device) -> Iterator[Spent]:
    """Measure what runs inside on a device."""
    spent = Spent()
    before = _start(device)
    began = time.monotonic()
    yield spent
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    spent.seconds = time.monotonic() - began
    peak = _peak(device)
    spent.working_bytes = None if before is None or peak is None else max(0, peak - before)


def memory_source(device: torch.device) -> str:
    """How :func:`measured` learns of memory, in words."""
    if device.type == "cuda":
        return "the most that torch had allocated on the GPU"
    return (
        "the most that the process had resident"
        if _start(device) is not None
        else "memory is not measured on this system"
    )


def _start(device: torch.device) -> int | None:
    """Set the peak back; bytes that are held now, None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return_freed_memory()
    try:
        _CLEAR.write_text("5")
    except OSError:  # not Linux, or /proc is read-only
        return None
    return _status_bytes("VmRSS")


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int | None:
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    kilobytes = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return 1024 * int(kilobytes[0]) if kilobytes else None


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that a model's modules hold, a kernel's own copies among them; a storage counts once."""
    storages = {}
    for module in model.modules():
        for leaf in tree_leaves(list(vars(module).values())):
            if isinstance(leaf, Tensor):
                storages[leaf.untyped_storage().data_ptr()] = leaf.untyped_storage().nbytes()
    return sum(storages.values())


def weights_dtype(model: nn.Module) -> str:
    """Name of the dtype of most of a model's floating-point parameters, e.g. "bfloat16"."""
    counts: dict[str, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            name = str(parameter.dtype).removeprefix("torch.")
            counts[name] = counts.get(name, 0) + parameter.numel()
    return max(counts, key=lambda name: counts[name])


def describe_device(device: torch.device) -> str:
    """The device in words: a GPU's name, or how many threads of the CPU compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' if threads > 1 else ''}"
