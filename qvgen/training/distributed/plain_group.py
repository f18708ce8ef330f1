"""The process group of torch among processes that :mod:`qvgen.training.distributed.launcher` started, all on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

COLLECTIVE_TIMEOUT = timedelta(days=7)
"""How long a process may wait for the others: one that samples long videos, or more of them, is late and not lost.

torch would end all of them after 10 minutes (nccl) or 30 (gloo). It is safe to wait, because the launcher watches the
processes themselves: whichever dies takes the others along within seconds. A process that lives and hangs is what
nobody notices any more. torch itself gives gloo at most 2^31 milliseconds, 24 days (distributed/rpc/constants.py).

Other clocks, which waiting does not set off: nccl's TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC (8 minutes) watches the watchdog
thread of the process itself, which goes on while the process waits or samples; the store, by which processes find each
other, takes this same time; the launcher's JOIN_SECONDS begin when rank 0 is done, so rank 0 is the last to be (it waits
for the others' files, see callbacks/validation.py).
"""


@contextmanager
def joined_group(*, rank: int, world_size: int, port: int) -> Iterator[None]:
    """The process group while the block runs, where nothing is trained: tensors of GPUs by NCCL, of the host by gloo.

    Args:
        rank: This process.
        world_size: All.
        port: Where they find each other, at 127.0.0.1.
    """
    import torch
    from torch import distributed

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    where = {"init_method": f"tcp://127.0.0.1:{port}", "rank": rank, "world_size": world_size}
    distributed.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT, **where)
    try:
        yield
    finally:
        leave_group()


def leave_group() -> None:
    """Take this process out of torch's process group: the next job of a --multirun makes its own."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # Lightning leaves them
        os.environ.pop(name, None)
