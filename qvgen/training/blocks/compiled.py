"""Blocks of a transformer under ``torch.compile`` while it trains.

Each block's forward is one graph without a break, and all blocks share it: one graph with Phi, one without. A new rank of
Phi, another timestep or another block compile nothing. Compiled runs have the same bits among themselves; eager ones have
others, since a compiler adds up in another order.

Hooks of blocks (sums of gradients, FSDP) stay outside of the graph. Measurements and sampled videos run eagerly.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._triton import has_triton

from qvgen.errors import UserError
from qvgen.training.distributed.sharding import blocks_of

BACKEND = "inductor"


def check_compiler() -> None:
    """Raise UserError where there is no compiler for this machine's device, before anything is computed."""
    if torch.cuda.is_available():
        if not has_triton():
            raise UserError("strategy.compile=true needs triton on a GPU; install it, or write strategy.compile=false")
    elif shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        raise UserError("strategy.compile=true needs a C++ compiler; install g++, or write strategy.compile=false")


def compile_blocks_(model: nn.Module) -> None:
    """Have a model's blocks compiled at their first call; :func:`uncompiled` has their own forward.

    Raises:
        ValueError: The model has no list of blocks.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no list of blocks to compile; use strategy.compile=false")
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=BACKEND)


def release_blocks_(model: nn.Module) -> None:
    """Give the blocks their own forward back."""
    for block in blocks_of(model):
        vars(block).pop("forward", None)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run the blocks eagerly inside, if they are compiled."""
    kept = {block: vars(block).pop("forward") for block in blocks_of(model) if "forward" in vars(block)}
    try:
        yield
    finally:
        for block, forward in kept.items():
            block.forward = forward
