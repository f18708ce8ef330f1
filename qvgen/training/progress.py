"""Progress of a long loop: a bar on a terminal, a line now and then in a log.

A bar is drawn over itself, which in a log file makes one line of hundreds of bars. Where stderr is no terminal, each state
is a line of its own instead, after ``FIRST_LINE_SECONDS`` at first and then ever more rarely: the next one when a fiftieth
of the time so far has passed, at the latest after ``MAX_LINE_SECONDS``. So a run of a minute has some lines, and one
of a week about two hundred a day.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Sized
from typing import Any, TextIO

from tqdm import tqdm

FIRST_LINE_SECONDS = 10.0
MAX_LINE_SECONDS = 600.0


class LineProgress(tqdm):  # type: ignore[type-arg]
    """A tqdm whose states are lines; everything else is tqdm's."""

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        """Write a state as a line; the same one is not written twice."""
        last = ""

        def write(state: str) -> None:
            nonlocal last
            if state.strip() and state.rstrip() != last:
                last = state.rstrip()
                file.write(f"{last}\n")
                file.flush()

        return write

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Show the state, then choose when to show the next one."""
        elapsed = self.format_dict["elapsed"]
        self.mininterval = self.maxinterval = min(MAX_LINE_SECONDS, max(FIRST_LINE_SECONDS, elapsed / 50))
        return bool(super().display(msg, pos))

    def close(self) -> None:
        """Write the last state; tqdm would end the line of its bar, and there is none."""
        if not self.disable:
            self.display()
            self.fp = io.StringIO()
            self.sp = self.status_printer(self.fp)
        super().close()


def progress_bar(
    iterable: Iterable[Any] | None = None,
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    rank: int | None = None,
) -> tqdm[Any]:
    """A bar on stderr, or lines where stderr is no terminal; both show the share done, the time left and the speed.

    Nothing is shown of a loop without turns.

    Args:
        iterable: What is gone through; None for a bar that is moved by hand.
        desc: What is done.
        unit: Of one turn.
        total: Turns in all; None: the iterable's length.
        initial: Turns that an earlier session did.
        rank: This process's, where there are several; None: there is one.
    """
    kind = tqdm if sys.stderr.isatty() else LineProgress
    options: dict[str, Any] = {"dynamic_ncols": True}
    if kind is LineProgress:
        options = {"mininterval": FIRST_LINE_SECONDS, "maxinterval": FIRST_LINE_SECONDS, "miniters": 1}
    if isinstance(iterable, Sized) and len(iterable) == 0:
        options["disable"] = True
    label = desc if rank is None else f"{desc}, rank {rank}"
    return kind(iterable, desc=label, unit=unit, total=total, initial=initial, **options)
