"""What rank 0 does about processes that share out items and report nothing: it says who is silent, and ends the command.

In training all processes wait for each other in every step (:mod:`qvgen.training.distributed.silence`). Here each is busy
with items of its own, and looked at by itself: one whose process gives no tick is named after some seconds, one that runs and
has said nothing of its item after minutes, both again whenever the silence has become twice as long. Whoever waits for the
others hangs only where its process gives no tick.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from qvgen.training.distributed import heartbeat
from qvgen.training.distributed.silence import BAD_ENVIRONMENT, SILENT_SECONDS, START_SECONDS

log = logging.getLogger(__name__)

ITEM_SECONDS = 300.0
"""So long may a call of a model take, or its loading between two items."""


class ItemWatch:
    """Looks after one group of processes while they share out items.

    Args:
        pulse: Their reports, which the caller reads.
        hang_minutes: The command is ended after so long without a report of one that is not waiting; None: never.
        key: The key that it was read from.
        name: Says what a rank's process is called.
        end: Ends the process, with an exit code and what there is to say.
    """

    def __init__(
        self,
        pulse: heartbeat.Pulse,
        *,
        hang_minutes: float | None,
        key: str,
        name: Callable[[int], str],
        end: Callable[[int | None, str], None],
    ) -> None:
        self._pulse, self._hang_minutes, self._key, self._name, self._end = pulse, hang_minutes, key, name, end
        self._said_seconds: dict[int, float] = {}

    def look(self, *, with_rank_0: bool = True) -> None:
        """Say who is silent; end the process where one has been for too long.

        Args:
            with_rank_0: Whether this process shares the items out with the others, and does nothing else besides.
        """
        now = time.monotonic()
        there = {rank: beat for rank, beat in enumerate(self._pulse.beats) if beat.end is None}
        began = {rank: beat for rank, beat in there.items() if rank and beat.is_there}
        lost = {rank for rank, beat in began.items() if now - beat.ticked_at > heartbeat.LOST_SECONDS}
        for rank, beat in there.items():
            if rank in lost:
                self._judge(rank, now - beat.ticked_at, patience=SILENT_SECONDS)
            elif beat.what == heartbeat.WAITING or lost or (rank == 0 and not with_rank_0):
                self._said_seconds.pop(rank, None)  # who waits for one that is lost is not to blame
            else:
                starts = beat.what == heartbeat.STARTING
                self._judge(rank, now - beat.at, patience=START_SECONDS if starts else ITEM_SECONDS)

    def _judge(self, rank: int, silent: float, *, patience: float) -> None:
        said = self._said_seconds.get(rank, 0.0)
        if self._hang_minutes is not None and silent > max(60 * self._hang_minutes, patience):
            words = self._pulse.describe_one(rank, self._name(rank))
            self._end(BAD_ENVIRONMENT, f"{words}: ended after {self._key}={self._hang_minutes:g}; ")
        if silent > max(patience, 2 * said):
            self._said_seconds[rank] = silent
            log.warning("%s", self._pulse.describe_one(rank, self._name(rank)))
        elif said and silent < patience:
            del self._said_seconds[rank]
            log.warning("rank %d (%s) reports again, after %.0f s or more", rank, self._name(rank), said)
