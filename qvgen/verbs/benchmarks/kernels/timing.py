"""Time of the candidates of ``benchmark kernels``: interleaved, on every number of threads, and what is made of it.

One round calls every candidate once for each number of threads, one right after the other: what else the machine does meets
the two calls of a ratio alike. Every round has its own order of candidates, the same in every run: what a call leaves behind
in caches and free memory (after large outputs the next call may wait for huge pages) meets no candidate in particular.

A call's time is the calling thread's processor time where it computes alone (what other programs take does not count; nor do
workers that still spin after the call before), and wall time on more threads. The ratio of two numbers of threads is of
wall times.

On a shared machine a call on more threads waits for the slowest of them, so that foreign load lowers the ratio more than
anything here could: read it beside F.linear's, and beside the processors that a call had. The best of each is what the least
disturbed calls gave. The same ratio of processor times, the calling thread's when alone over the busiest thread's, leaves out
what others take, but counts a thread that spins for another (GOMP_SPINCOUNT=0 keeps GNU OpenMP's from it) and, where work is
shared out while it is done, all that the less disturbed thread takes over: it is a lower bound of how evenly work is shared.
It says nothing of threads that wait for memory together.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import nan
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor

BF16, PREPACKED, FLOAT32 = "F.linear bf16", "prepacked bf16", "F.linear float32"
BASELINES = (BF16, PREPACKED, FLOAT32)
"""What candidates are compared with, where the processor has it."""
SLOW = 8.0
"""A candidate that takes this many times the fastest baseline's time runs in the first two rounds alone."""
REST_S = 0.01
"""Pause before a call where several numbers of threads are measured: GNU OpenMP's workers spin for some milliseconds."""

TASKS = Path("/proc/self/task")
"""Folder in which Linux lists the threads of this process."""

Candidates = dict[str, Callable[[], Tensor]]


class Sample(NamedTuple):
    """One call, in seconds."""

    thread: float
    """Processor time of the calling thread."""
    process: float
    """Processor time of all threads."""
    busiest: float
    """Processor time of the thread that took most; nan where the system is not Linux."""
    wall: float


Samples = dict[tuple[int, str], list[Sample]]
"""Of each number of threads and candidate, by rounds."""


def interleaved(
    candidates: Mapping[int, Candidates],
    *,
    rounds: int,
    measure: Callable[[Callable[[], object]], Sample] | None = None,
) -> Samples:
    """Call all candidates in every round, each on every number of threads in turn; one call of each before, unmeasured.

    Args:
        candidates: Of each number of threads; all have the same names and a baseline among them.
        rounds: Calls of each; slow ones have two.
        measure: What measures a call; None: :func:`sample`.
    """
    measure = measure or sample
    base = next(iter(candidates))
    samples: Samples = {(threads, name): [] for threads in candidates for name in candidates[threads]}
    rest = REST_S if len(candidates) > 1 else 0.0
    slow: set[str] = set()
    # A compiled peer that would compile anew does not run what was built for it: better an error.
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        for threads, calls in candidates.items():
            torch.set_num_threads(threads)
            for call in calls.values():
                call()
        for index in range(rounds):
            names = list(candidates[base])
            if index == 2:
                quick = SLOW * min(samples[base, name][0].thread for name in BASELINES if name in names)
                slow = {name for name in names if samples[base, name][0].thread >= quick}
            random.Random(index).shuffle(names)
            for name in names:
                if name in slow:
                    continue
                for threads, calls in candidates.items():
                    torch.set_num_threads(threads)
                    time.sleep(rest)
                    samples[threads, name].append(measure(calls[name]))
    return samples


def sample(call: Callable[[], object]) -> Sample:
    """Measure one call; to free what it returns is a part of it."""
    threads = _processor_times()
    began = (time.thread_time(), time.process_time(), time.perf_counter())
    call()
    ended = (time.thread_time(), time.process_time(), time.perf_counter())
    thread, process, wall = (second - first for first, second in zip(began, ended, strict=True))
    busiest = max((spent - threads.get(task, 0.0) for task, spent in _processor_times().items()), default=nan)
    return Sample(thread=thread, process=process, busiest=busiest, wall=wall)


def _processor_times() -> dict[int, float]:
    """Seconds of each thread of this process, by its number in the system; nothing where /proc does not list them."""
    times = {}
    for task in TASKS.iterdir() if TASKS.is_dir() else ():
        with suppress(OSError):  # it ended meanwhile
            times[int(task.name)] = time.clock_gettime(
                ~int(task.name) << 3 | 6
            )  # Linux: the processor clock of a thread
    return times


def clock(threads: int) -> str:
    """The field of a sample that is a candidate's time."""
    return "thread" if threads == 1 else "wall"


def seconds(samples: Sequence[Sample], threads: int) -> list[float]:
    """A candidate's times, by rounds."""
    return [getattr(one, clock(threads)) for one in samples]


def ratio(base: Sequence[float], others: Sequence[float]) -> float:
    """Median over the rounds of how many times as fast as the base."""
    return median(first / second for first, second in zip(base, others, strict=False))


def scaling(base: Sequence[Sample], more: Sequence[Sample]) -> dict[str, Any]:
    """How many times as fast on more threads, in wall time.

    Returns:
        median, quartiles: of the rounds' ratios; quartiles [first, third], the extremes where there are only two rounds.
        best: the fastest call on few threads over the fastest on more.
        by_processor_time: median of the rounds' ratios of the calling thread's processor time on few to the busiest thread's
            on more; nan where the system is not Linux.
        processors: median over the calls on more threads of processor time per wall time; the number of threads if nothing
            else ran and no thread waited for another.
    """
    ratios = [few.wall / many.wall for few, many in zip(base, more, strict=True)]
    low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 2 else (min(ratios), 0.0, max(ratios))
    return {
        "median": median(ratios),
        "quartiles": [low, high],
        "best": min(one.wall for one in base) / min(one.wall for one in more),
        "by_processor_time": median(few.thread / many.busiest for few, many in zip(base, more, strict=True)),
        "processors": median(one.process / one.wall for one in more),
    }
