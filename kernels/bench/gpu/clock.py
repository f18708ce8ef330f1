"""Times of calls: interleaved, by the card's own events, after calls that do not count.

Every round calls each candidate once, so that a card that grows warm or slows down meets all of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from qvgen_kernels.triton.tune import call_ms as by_events

__all__ = ["by_events", "by_wall", "compare"]

Timer = Callable[[Callable[[], object]], float]
"""Milliseconds of one call."""

ROUNDS = (5, 40)
SECONDS = 0.4
"""What all rounds of a comparison may take, within the limits of ROUNDS."""


def by_wall(call: Callable[[], object]) -> float:
    """Milliseconds of a call on the CPU."""
    began = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - began)


def compare(
    calls: Mapping[str, Callable[[], object]], *, timer: Timer, rounds: int | None = None
) -> dict[str, dict[str, Any]]:
    """Time candidates against each other.

    Args:
        calls: The candidates by name.
        timer: What measures a call.
        rounds: Calls of each; None: as many as fit into SECONDS.

    Returns:
        Name -> median, lowest and highest milliseconds, and the number of rounds; or the error of one that failed.
    """
    found: dict[str, dict[str, Any]] = {}
    working: dict[str, Callable[[], object]] = {}
    cost = 0.0
    for name, call in calls.items():
        try:
            call()
            call()
            cost += timer(call)
        except Exception as error:  # a candidate of somebody else's may raise anything, and the others go on
            found[name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
        else:
            working[name] = call
    if rounds is None:
        low, high = ROUNDS
        rounds = max(low, min(high, int(1000 * SECONDS / max(cost, 1e-3))))
    times: dict[str, list[float]] = {name: [] for name in working}
    for _ in range(rounds):
        for name, call in working.items():
            times[name].append(timer(call))
    for name, own in times.items():
        found[name] = {"ms": median(own), "low_ms": min(own), "high_ms": max(own), "rounds": rounds}
    return {name: found[name] for name in calls}
