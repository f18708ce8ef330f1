"""Where training looks whether it shall stop: behind a step, and before each call of a model that is only measured.

Several processes that need each other in the call (sharded models) ask together, so that all leave at the same one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed, nn

from qvgen import stop_request
from qvgen.training.distributed import heartbeat


def agreed(*answers: bool, together: bool) -> tuple[bool, ...]:
    """What any process says yes to: the answers themselves where ``together`` is False, a collective otherwise."""
    if not together:
        return answers
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    votes = torch.tensor(answers, dtype=torch.int32, device=device)
    distributed.all_reduce(votes, op=distributed.ReduceOp.MAX)
    return tuple(bool(vote) for vote in votes.tolist())


@contextmanager
def interruptible(model: nn.Module, *, together: bool) -> Iterator[None]:
    """While the block runs, a call of the model after a request to stop raises Stopped in place of computing.

    Args:
        model: What is sampled or measured.
        together: All processes call it alike, and leave it at the same call.
    """

    def look(module: nn.Module, inputs: object) -> None:
        del module, inputs
        heartbeat.report(heartbeat.MEASURING)
        if any(agreed(stop_request.is_requested(), together=together)):
            raise stop_request.Stopped

    handle = model.register_forward_pre_hook(look, prepend=True)  # before FSDP gathers the weights
    try:
        yield
    finally:
        handle.remove()
