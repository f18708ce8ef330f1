"""Work on layers that do not depend on each other, several at a time, in threads that share the model's memory.

torch's operators leave Python's lock while they compute, so threads are as fast as processes would be, and nothing is copied.
Each thread has torch's own number of threads: the bits are those of one layer after the other.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

SCRATCH_BYTES = 8 << 30
"""Memory that the layers on which a process works at the same time may take, beside the model."""

Result = TypeVar("Result")


def num_threads(weights: Iterable[Tensor], *, scratch_per_weight: int, neighbours: int = 1) -> int:
    """How many layers are worked on at a time: what the cores that this process may use, and memory, allow.

    Args:
        weights: The layers' weights. On another device than the CPU, which does one thing after the other, it is one.
        scratch_per_weight: Bytes that a layer takes while it is worked on, for each of its weights.
        neighbours: Processes that work on layers on the same cores, this one included; each has its own scratch memory.
    """
    weights = list(weights)
    if any(weight.device.type != "cpu" for weight in weights):
        return 1
    largest = scratch_per_weight * max((weight.numel() for weight in weights), default=0)
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, min(cores // (neighbours * torch.get_num_threads()), SCRATCH_BYTES // max(1, largest)))


def idle_threads() -> int:
    """How many jobs without much memory are done at a time by a process that has all cores for itself."""
    return num_threads([], scratch_per_weight=0)


def in_threads(jobs: Iterable[Callable[[], Result]], *, threads: int) -> Iterator[Result]:
    """Results of jobs in their order, up to ``threads`` of which run at the same time.

    Jobs are taken from the iterable in this thread, at most twice as many ahead of the results as there are threads. When one
    of them raises, or the caller goes no further, those that were not begun never are, and those that were are waited for.

    Args:
        jobs: None of them may need what another one changes.
        threads: 1 runs them here, one after the other.

    Example:
        >>> list(in_threads((lambda n=n: n * n for n in range(5)), threads=2))
        [0, 1, 4, 9, 16]
    """
    if threads == 1:
        for job in jobs:
            yield job()
        return
    has_gradients = torch.is_grad_enabled()  # a thread has modes of its own

    def run(job: Callable[[], Result]) -> Result:
        with torch.set_grad_enabled(has_gradients):
            return job()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="layers")
    pending: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            pending.append(pool.submit(run, job))
            if len(pending) >= 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
