"""A checkpoint that a thread writes while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path


class BackgroundSave:
    """Writes a checkpoint in a thread of its own, from tensors that nobody changes.

    Args:
        path: The checkpoint.
        write: Writes it, whole or not at all.

    Attributes:
        path: The checkpoint.
    """

    def __init__(self, path: Path, write: Callable[[], None]) -> None:
        self.path = path
        self._write = write
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"save {path.name}", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether it is there, or failed."""
        return not self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether it failed, so that :meth:`wait` says why."""
        return self.is_done and self._error is not None

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is there; whether it is, in time.

        Raises:
            BaseException: What kept it from being written.
        """
        self._thread.join(timeout_s)
        if self.is_done and self._error is not None:
            raise self._error
        return self.is_done

    def _run(self) -> None:
        try:
            self._write()
        except BaseException as error:  # raised where somebody waits
            self._error = error
