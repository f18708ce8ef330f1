"""A thread of each process that another launcher started: it looks at the store that they share several times a second.

It passes on a request to stop, which may reach any process alone, and ends a process that waits in a collective for one that
failed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from torch.distributed import Store

from qvgen import stop_request
from qvgen.config.processes.launched_world import LaunchedWorld
from qvgen.errors import one_line
from qvgen.training.distributed.peer_links import GRACE_SECONDS

END, STOP, FAILED = "end", "stop", "failed"
"""Keys of the store: rank 0's exit code, the signal that some process was sent, and why another rank ended."""

POLL_SECONDS = 0.2


class StoreWatch:
    """The thread.

    Args:
        store: A connection of its own: what waits in another one holds that.
        world: This process and the others.
        end: Ends this process, for a reason in words.
    """

    def __init__(self, store: Store, *, world: LaunchedWorld, end: Callable[[str], None]) -> None:
        self._store, self._world, self._end = store, world, end
        self._left = threading.Event()
        self._is_stop_told = False
        self._thread = threading.Thread(target=self._watch, name="watch_meeting", daemon=True)

    def start(self) -> None:
        """Begin; :meth:`close` ends it."""
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._left.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._left.wait(POLL_SECONDS):
            try:
                self._pass_on_stop()
                why = self._end_of_another()
            except RuntimeError as error:
                why = f"rank 0 at {self._world.address}:{self._world.port} is gone ({one_line(error)})"
            if why and not self._left.wait(GRACE_SECONDS):
                self._end(why)

    def _pass_on_stop(self) -> None:
        own = stop_request.number()
        if own is not None and not self._is_stop_told:
            self._is_stop_told = True
            self._store.set(STOP, str(own))
        elif own is None and self._store.check([STOP]):
            stop_request.forward(int(self._store.get(STOP)))

    def _end_of_another(self) -> str | None:
        if self._store.check([FAILED]):
            return str(self._store.get(FAILED).decode())
        if self._world.rank and self._store.check([END]) and (code := int(self._store.get(END))):
            return f"rank 0 ended with exit code {code}"
        return None
