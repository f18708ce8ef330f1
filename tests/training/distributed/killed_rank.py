"""A callback that kills its process in a step of a run, where the environment says so; otherwise it looks on."""

from __future__ import annotations

import os
import signal
from typing import Any

import lightning


class KilledRank(lightning.Callback):
    """Kills the rank of ``QVGEN_TEST_KILL=rank:step`` in the middle of this step; not once torchrun has started it again."""

    def on_before_backward(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Between the forward and the backward pass."""
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            return
        if os.environ.get("QVGEN_TEST_KILL") == f"{trainer.global_rank}:{trainer.global_step}":
            os.kill(os.getpid(), signal.SIGKILL)
