"""A callback that fails in rank 1 alone, as on a node that lacks a folder, where the environment says so."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import lightning

MESSAGE = "/node2/clips: No such file or directory"


class FailingRank(lightning.Callback):
    """Fails at ``QVGEN_TEST_FAIL``: ``build`` (the configuration), ``setup`` (behind the process group) or ``batch``."""

    def __init__(self) -> None:
        self._fail("build")

    def setup(self, *_: Any, **__: Any) -> None:
        """When training begins."""
        self._fail("setup")

    def on_train_batch_start(self, *_: Any) -> None:
        """Before the first batch."""
        self._fail("batch")

    def _fail(self, place: str) -> None:
        words = sys.argv
        rank = words[words.index("--rank") + 1] if "--rank" in words else os.environ.get("SLURM_PROCID")
        if rank == "1" and os.environ.get("QVGEN_TEST_FAIL") == place:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/node2/clips")
