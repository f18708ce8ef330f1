"""Who does which of some numbered items: each process takes the next number that nobody has taken, until none is left.

    one process      0  1  2  3  4  5
    two processes    0     2  3     5        whoever is free takes the next one, however long each takes
                        1        4

Nobody waits for another one while it takes and does items. What they make lies in files that are there whole or not at all;
rank 0, which needs them all, is the only one that waits for them (:class:`qvgen.training.distributed.store_queue.StoreQueue`
is the queue of several processes). An item that a process can't do goes back, and is rank 0's.
"""

from __future__ import annotations

from itertools import count
from typing import Protocol


class ItemQueue(Protocol):
    """Gives out numbers, each to one process.

    Attributes:
        num_processes: How many take part.
    """

    num_processes: int

    def take(self, stage: str) -> int:
        """The next number of a stage, from 0; there is no end: who takes one behind the last item is done."""

    def give_back(self, stage: str, number: int) -> None:
        """Leave an item that was taken to rank 0."""

    def is_given_back(self, stage: str, number: int) -> bool:
        """As rank 0: whether another process left an item."""

    def wait(self) -> None:
        """On rank 0: sleep a moment before looking again for an item that another process is making."""

    def done_waiting(self) -> None:
        """On rank 0: declare that this process no longer waits for another one."""


class OneProcess:
    """The queue of a process that does everything alone."""

    num_processes = 1

    def __init__(self) -> None:
        self._counts: dict[str, count[int]] = {}

    def take(self, stage: str) -> int:
        """See :class:`ItemQueue`."""
        return next(self._counts.setdefault(stage, count()))

    def give_back(self, stage: str, number: int) -> None:
        """There is nobody to give it to."""
        raise AssertionError(f"item {number} of {stage} given back by the only process")

    def is_given_back(self, stage: str, number: int) -> bool:
        """See :class:`ItemQueue`."""
        del stage, number
        return False

    def wait(self) -> None:
        """There is nobody to wait for."""
        raise AssertionError("the only process waits for another one")

    def done_waiting(self) -> None:
        """See :class:`ItemQueue`."""
