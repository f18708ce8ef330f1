"""Processes that sample videos in groups, each of which shares one video's tokens out (context parallelism).

    ranks     0 1 | 2 3 | 4 5 | 6 7        groups of 2, devices=8
    videos     a     b     c     a'        whichever group is free takes the next one
    rank 0    takes a video, tells rank 1; both sample it, with the same noise; rank 0 writes it

Within a group every process computes its part of the tokens in the transformer, and the whole video around it. A group waits
for no other one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from qvgen import work_item
from qvgen.models.context_parallel import SharedSequence

T = TypeVar("T")
_END = -1


class VideoGroup:
    """The group of one process; a collective of all processes to make.

    Args:
        size: Processes of a group, ranks that follow each other; 1: each samples whole videos.
        device: Where they compute.
        timeout: How long one may wait for another.

    Attributes:
        number: Which group it is.
        is_first: Whether this process takes the group's videos, and writes them.
    """

    def __init__(self, size: int, *, device: torch.device, timeout: timedelta) -> None:
        rank, world = distributed.get_rank(), distributed.get_world_size()
        self.number, self.is_first = rank // size, rank % size == 0
        self._first = rank - rank % size
        self._sequence = None
        if size > 1:
            groups = {
                first: distributed.new_group(list(range(first, first + size)), backend="gloo", timeout=timeout)
                for first in range(0, world, size)
            }
            self._group = groups[self._first]
            self._sequence = SharedSequence([], processes=size, device=device)

    def together(self, items: Iterable[T], *, among: Sequence[T]) -> Iterator[T]:
        """The items of this process's group, each when all of it ask for one.

        Args:
            items: What the first process takes, one after the other; the others do not look at it.
            among: All items of all groups, in the same order everywhere.
        """
        if self._sequence is None:
            yield from items
            return
        if self.is_first:
            for item in items:
                self._tell(among.index(item))
                yield item
            self._tell(_END)
            return
        while (number := self._tell(_END)) != _END:
            yield among[number]

    def _tell(self, number: int) -> int:
        """The number that the first process says."""
        if not self.is_first:
            work_item.wait()
        box = torch.tensor([number])
        distributed.broadcast(box, src=self._first, group=self._group)
        return int(box.item())

    def shared(self, models: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """Have calls of models in a block share their tokens out."""
        return nullcontext() if self._sequence is None else self._sequence.of(models).applied()


def said_by_rank_0(value: Any) -> Any:
    """What rank 0 says, in all processes; a collective.

    Args:
        value: Rank 0's; that of the others does not matter.
    """
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: T) -> list[T]:
    """The values of all processes, on rank 0 alone; a collective."""
    found: list[Any] | None = [None] * distributed.get_world_size() if distributed.get_rank() == 0 else None
    distributed.gather_object(value, found, dst=0)
    return found or []
