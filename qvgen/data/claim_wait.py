"""Waiting for what another process has claimed, where nobody watches that process: tasks of torchrun or SLURM, two commands.

Claims are locks, which end with their process: one that is gone is no matter. One that was stopped keeps its claims, and one
that hangs too. The kernel knows whose a lock is, on this machine.
"""

from __future__ import annotations

import logging
import socket
import time

from qvgen import work_item
from qvgen.data.claims import POLL_SECONDS, Claims
from qvgen.errors import UnfitEnvironmentError

log = logging.getLogger(__name__)

STOPPED_SECONDS, LONG_SECONDS = 5.0, 300.0
"""After so long it is said who has what is waited for: a process that is stopped, one that runs; again whenever the time has
become twice as long."""


class ClaimWait:
    """Waits, and says for whom.

    Args:
        claims: This process's, in the folder of what is made.
    """

    def __init__(self, claims: Claims) -> None:
        self._claims = claims
        self._key = ""
        self._since = self._said = 0.0

    def wait(self, key: str) -> None:
        """Wait a moment for the first of the items that others have.

        Args:
            key: Its claim's.

        Raises:
            UnfitEnvironmentError: The process that has it was stopped, and still is after ``hang_minutes``.
        """
        work_item.wait()
        time.sleep(POLL_SECONDS)
        if work_item.is_watched():
            return
        now = time.monotonic()
        if key != self._key:
            self._key, self._since, self._said = key, now, 0.0
        if (waited := now - self._since) > STOPPED_SECONDS:
            self._judge(waited)

    def _judge(self, waited: float) -> None:
        holder = self._claims.holder(self._key)
        is_stopped = holder is not None and work_item.process_state(holder) in ("T", "t")
        who = "another process" if holder is None else work_item.process_words(holder, host=socket.gethostname())
        words = f"waiting for {waited:.0f} s for what {who} has claimed in {self._claims.folder}"
        minutes = work_item.hang_minutes()
        if is_stopped and minutes is not None and waited > 60 * minutes:
            raise UnfitEnvironmentError(f"{words}: ended after hang_minutes={minutes:g}; the same command goes on")
        if waited > max(STOPPED_SECONDS if is_stopped else LONG_SECONDS, 2 * self._said):
            self._said = waited
            log.warning("%s", words)
