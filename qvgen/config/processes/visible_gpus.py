"""The GPUs that this process sees, counted without touching one, and the choice of some of them.

Which GPUs there are is asked of NVML (``torch.cuda.device_count``), which opens none: a process that only counts takes no
memory of any, and ``CUDA_VISIBLE_DEVICES`` may still be narrowed, which has no effect once CUDA has begun.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from qvgen.errors import UserError

VARIABLE = "CUDA_VISIBLE_DEVICES"


def count_gpus() -> int:
    """How many GPUs this process and its children can use; the one place that asks, which tests stand in for."""
    import torch

    return torch.cuda.device_count()


def describe_gpus() -> str:
    """The GPUs that can be used, in words.

    Example:
        >>> describe_gpus()  # doctest: +SKIP
        '2 GPUs are visible here (CUDA_VISIBLE_DEVICES=4,5), numbered from 0'
    """
    number = count_gpus()
    hidden = f" ({VARIABLE}={os.environ[VARIABLE]})" if VARIABLE in os.environ else ""
    return f"{number or 'no'} GPU{' is' if number == 1 else 's are'} visible here{hidden}" + (
        ", numbered from 0" if number > 1 else ""
    )


@contextmanager
def only_gpus(chosen: Sequence[int] | None) -> Iterator[None]:
    """Hide all other GPUs from this process and from those that it starts, while a block runs.

    Args:
        chosen: Numbers among the GPUs that are visible now; None: all of them, as they are.

    Raises:
        UserError: One is not there, or this process has begun to use CUDA, which looks only once.
    """
    if chosen is None:
        yield
        return
    shown, before = f"devices=[{','.join(map(str, chosen))}]", os.environ.get(VARIABLE)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise UserError(f"{shown}: this process uses GPUs already; start the command by itself")
    entries = None if before is None else [entry.strip() for entry in before.split(",")]
    if entries is None or max(chosen) < len(entries):
        os.environ[VARIABLE] = ",".join(str(number) if entries is None else entries[number] for number in chosen)
    try:
        if count_gpus() != len(chosen) or (entries is not None and max(chosen) >= len(entries)):
            _restore(before)
            raise UserError(f"{shown}: {describe_gpus()}; leave out those that are not there")
        yield
    finally:
        _restore(before)


def _restore(value: str | None) -> None:
    if value is None:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = value
