"""The rank that the others wait for in every step, named: a process on a slow, hot or busy device holds all of them up.

    each rank    seconds of its own forward passes, median of 20 steps --> the store by which the processes found each other
    rank 0       the medians of all ranks: one beyond 1.5 times their median is named, once until another one is

A forward pass of ``ddp`` waits for nobody, so its time is the process's own; the backward pass is as long for all. Models
that are shared out gather their blocks in the forward pass too: there a slow rank is as slow as those that wait for it, and
nothing is measured. On a GPU the time is between two events of its stream, which are read when the step's numbers have been
read: no device is waited for, and there is no collective.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import lightning
import torch
from torch.distributed import PrefixStore, Store

from qvgen.training.distributed.store_exchange import default_store

log = logging.getLogger(__name__)

STEPS = 20
"""So many steps make a median."""

FACTOR = 1.5
"""Of the median of all ranks, of two of the faster one: a rank that takes longer is slow."""


class Pace:
    """The exchange of the ranks' times.

    Args:
        store: The processes' own.
        rank: This process.
        world_size: All.
    """

    def __init__(self, store: Store, *, rank: int, world_size: int) -> None:
        self._store = PrefixStore("qvgen/pace", store)
        self.rank, self.world_size = rank, world_size
        self._seconds: deque[float] = deque(maxlen=STEPS)
        self._named: list[int] = []

    def add(self, seconds: float) -> str | None:
        """The forward passes of a step took so long here; as rank 0 returns what there is to say, if anything."""
        self._seconds.append(seconds)
        if len(self._seconds) < STEPS:
            return None
        self._store.set(str(self.rank), repr(statistics.median(self._seconds)))
        self._seconds.clear()
        keys = [str(rank) for rank in range(self.world_size)]
        if self.rank or not self._store.check(keys):  # one that has not told yet is looked at the next time
            return None
        told = [float(self._store.get(key)) for key in keys]
        slow, before = slow_ranks(told), self._named
        self._named = slow
        return _sentence(slow, told) if slow and slow != before else None


def slow_ranks(seconds: Sequence[float]) -> list[int]:
    """Ranks that take longer than :data:`FACTOR` allows, the slowest one first.

    Example:
        >>> slow_ranks([1.0, 1.1, 1.6, 0.9, 2.0]), slow_ranks([1.0, 1.4]), slow_ranks([1.0, 4.0])
        ([4], [], [1])
    """
    median = statistics.median(seconds) if len(seconds) > 2 else min(seconds)
    found = [rank for rank, own in enumerate(seconds) if own > FACTOR * median]
    return sorted(found, key=lambda rank: -seconds[rank])


def _sentence(slow: Sequence[int], seconds: Sequence[float]) -> str:
    shown = ", ".join(f"rank {rank} {seconds[rank]:.3g} s" for rank in slow)
    others = statistics.median(own for rank, own in enumerate(seconds) if rank not in slow)
    return (
        f"slow: the forward passes of a step take {shown} and {others:.3g} s on the others, which wait in every step: look "
        "at what else its machine or GPU does"
    )


class PaceCallback(lightning.Callback):
    """Measures the forward passes of this process, and names the slowest ranks as rank 0.

    Put it behind the callback that reads the numbers of a step: the device is done with the forward passes then.
    """

    def __init__(self) -> None:
        self._pace: Pace | None = None
        self._last_step = 0
        self._began: Any = None
        self._passes: list[tuple[Any, Any]] = []

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Find the others."""
        del pl_module
        self._last_step = trainer.global_step
        self._pace = Pace(default_store(), rank=trainer.global_rank, world_size=trainer.world_size)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note when the forward pass of a micro-batch begins."""
        del trainer, batch, batch_idx
        self._began = _now(pl_module.device)

    def on_before_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: torch.Tensor
    ) -> None:
        """Note when the forward pass ended and keep its times."""
        del trainer, loss
        self._passes.append((self._began, _now(pl_module.device)))

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """An optimizer step may be complete, and its numbers read."""
        del pl_module, outputs, batch, batch_idx
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        assert self._pace is not None
        seconds = sum(_between(began, ended) for began, ended in self._passes)
        self._passes.clear()
        if (sentence := self._pace.add(seconds)) is not None:
            log.warning("%s", sentence)


def _now(device: torch.device) -> Any:
    """A moment: of the GPU's stream, or of the clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(began: Any, ended: Any) -> float:
    """Seconds between two moments that lie in the past."""
    return ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1000
