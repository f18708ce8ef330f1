"""Loggers of others never cost a training anything: one that fails is left alone from then on, with a warning."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from lightning.pytorch.loggers import Logger

from qvgen.errors import one_line

log = logging.getLogger(__name__)

_GUARDED = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint")
"""What Lightning, its callbacks and a run call of a logger."""


def guard_(logger: Logger) -> Logger:
    """Have a logger's methods warn once and then do nothing, where they raise an error.

    In place, so that it stays what it is: ``experiment`` and ``isinstance`` are as a user's callback expects them.
    """
    has_failed = False

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal has_failed
            if has_failed:
                return None
            try:
                return method(*args, **kwargs)
            except Exception as error:  # the border to a service: nothing that it raises is worth a training
                has_failed = True
                name, what = type(logger).__name__, type(error).__name__
                log.warning("%s failed, training goes on without it (%s: %s)", name, what, one_line(error))
                return None

        return call

    for name in _GUARDED:
        setattr(logger, name, guarded(getattr(logger, name)))
    return logger
