"""Whether DeepSpeed is there and has something to run on, and how much it sends at once."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from qvgen.config.schema.strategy import StrategyConfig
from qvgen.errors import UserError

BUCKET = 50_000_000
"""Numbers of a bucket of gradients or weights, which is sent at once: 200 MB of float32."""


def check_deepspeed(strategy: StrategyConfig) -> None:
    """Raise UserError where ``strategy=deepspeed`` has no package or no GPU, before anything is computed.

    DeepSpeed's own DS_ACCELERATOR=cpu has it run on CPUs, as tests do.
    """
    if strategy.name != "deepspeed":
        return
    if not torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        raise UserError(
            "strategy=deepspeed is for GPUs, and there is none here; write strategy=ddp or strategy=fsdp (on a machine with "
            "GPUs it needs: pip install deepspeed)"
        )
    if find_spec("deepspeed") is None:
        raise UserError("strategy=deepspeed needs DeepSpeed; pip install deepspeed, or write strategy=fsdp")
