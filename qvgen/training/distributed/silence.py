"""What rank 0 does about processes that report nothing: it says who is silent, and ends a run that nobody moves any more.

All processes wait for each other in every step, so that one that hangs makes all silent. It is said after a few steps' time,
again whenever the silence has become twice as long, and ends the run after ``training.hang_minutes``. A request to stop does
not wait for a step that never ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from qvgen import stop_request
from qvgen.training.distributed import heartbeat

log = logging.getLogger(__name__)

BAD_ENVIRONMENT = 2
"""Exit code where a process died or hangs."""

SILENT_STEPS, SILENT_SECONDS = 10, 5.0
"""After so many times the median step, and at least so many seconds, without a report of any rank it is said who is silent;
again whenever it has become twice as long. A request to stop waits no longer than that for the end of a step."""
FIRST_SECONDS, SAVING_SECONDS = 60.0, 900.0
"""The same before a step was measured, and while a checkpoint is written or rank 0 waits for the others' last videos."""
START_SECONDS = 1800.0
"""``hang_minutes`` is at least so long before a step was measured: reading large models and compiling report nothing."""


class SilenceWatch:
    """Looks after one group of processes while they train.

    Args:
        pulse: Their reports, which the caller reads.
        hang_minutes: The run is ended after so long without a report of any rank; None: never. It is longer before rank 0
            has done some steps, because loading and compiling take their time.
        describe: Says whom the others wait for.
        end: Ends the process, with an exit code (None: that of the signal that came) and what there is to say.
    """

    def __init__(
        self,
        pulse: heartbeat.Pulse,
        *,
        hang_minutes: float | None,
        describe: Callable[[], str],
        end: Callable[[int | None, str], None],
    ) -> None:
        self._pulse, self._hang_minutes, self._describe, self._end = pulse, hang_minutes, describe, end
        self._said_seconds = 0.0

    def look(self) -> None:
        """Say who is silent; end the process where it was asked to stop, or told not to wait longer, and no step ends."""
        pulse, silent = self._pulse, self._pulse.silent_seconds()
        if pulse.is_at_the_end():
            return
        median = pulse.median_seconds()
        patience = FIRST_SECONDS if median is None else max(SILENT_SECONDS, SILENT_STEPS * median)
        patience = max(patience, SAVING_SECONDS) if pulse.is_slow() else patience
        if stop_request.is_postponed_request() and (silent > patience or pulse.is_left_alone()):
            self._end(None, "" if pulse.is_left_alone() else f"{self._describe()}; ")
        if median is not None and silent > max(patience, 2 * self._said_seconds):
            self._said_seconds = silent
            log.warning("%s; a step takes %.1f s", self._describe(), median)
        elif self._said_seconds and silent < patience:
            log.warning("all ranks report again, after %.0f s or more", self._said_seconds)
            self._said_seconds = 0.0
        self.end_if_hung(silent, is_training=median is not None)

    def end_if_hung(self, silent: float, *, is_training: bool) -> None:
        """End the process after ``hang_minutes``.

        Args:
            silent: Seconds without a report.
            is_training: Whether the first steps are done.
        """
        least = 0 if is_training else START_SECONDS
        if self._hang_minutes is not None and silent > max(60 * self._hang_minutes, least):
            why = f"{self._describe()}: ended after training.hang_minutes={self._hang_minutes:g}; "
            self._end(BAD_ENVIRONMENT, why)
