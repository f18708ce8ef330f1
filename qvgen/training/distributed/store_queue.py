"""The queue of a run's processes when training is over: a counter in the store by which they found each other.

It is no collective: who takes a number waits for nobody. Only two things are waited for: the other processes wait until
rank 0 says that there is something to do, and rank 0 waits for files of the others when it has nothing left to do itself.
Whoever watches the processes (launcher.py, meeting.py) ends them where one is gone or hangs meanwhile.
"""

from __future__ import annotations

import time

from torch.distributed import PrefixStore, Store

from qvgen import stop_request
from qvgen.training.distributed import heartbeat

POLL_SECONDS = 0.05
_BEGIN = "begin"


class StoreQueue:
    """Gives out numbers, each to one process; see :class:`qvgen.evaluation.item_queue.ItemQueue`.

    Args:
        store: The processes' own.
        num_processes: How many take part.

    Example:
        >>> from torch.distributed import HashStore
        >>> one = StoreQueue(HashStore(), num_processes=2)
        >>> one.take("a"), one.take("a"), one.take("b")
        (0, 1, 0)
    """

    def __init__(self, store: Store, *, num_processes: int) -> None:
        self._store = PrefixStore("qvgen/items", store)
        self.num_processes = num_processes

    def begin(self, message: str) -> None:
        """As rank 0: let the others begin.

        Args:
            message: What they need to know.
        """
        self._store.set(_BEGIN, message)

    def wait_to_begin(self) -> str:
        """As another process: wait until rank 0 lets begin; its message."""
        heartbeat.report(heartbeat.WAITING)
        while not self._store.check([_BEGIN]):
            self._pause()
        message: str = self._store.get(_BEGIN).decode()
        return message

    def take(self, stage: str) -> int:
        """The next number of a stage, from 0."""
        number: int = self._store.add(f"{stage}/next", 1)
        return number - 1

    def give_back(self, stage: str, number: int) -> None:
        """Leave an item that was taken to rank 0."""
        self._store.set(f"{stage}/back/{number}", "")

    def is_given_back(self, stage: str, number: int) -> bool:
        """As rank 0: whether another process left an item."""
        return bool(self._store.check([f"{stage}/back/{number}"]))

    def wait(self) -> None:
        """On rank 0: wait a moment before the next look; after the first call a process that does nothing hangs."""
        heartbeat.report_change(heartbeat.WAITING)
        self._pause()

    def done_waiting(self) -> None:
        """On rank 0: declare that this process no longer waits for another one."""
        heartbeat.report(heartbeat.DELIVERING)

    def _pause(self) -> None:
        stop_request.check()
        time.sleep(POLL_SECONDS)
