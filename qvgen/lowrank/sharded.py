"""Tensors of which every process holds a share of the rows, read and written whole.

They are torch's DTensors, which FSDP2 makes of Parameters. An ordinary tensor is its own whole. Both functions are
collectives for a sharded one: every process of its mesh calls them, in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is one of torch's DTensors, told without importing them where it is an ordinary one.

    Their module imports a library of symbolic arithmetic, which takes most of a second.
    """
    if type(tensor) is Tensor or type(tensor) is nn.Parameter:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def shard_group(tensor: DTensor) -> ProcessGroup:
    """The processes that have a sharded tensor between them; there may be more such groups that have the same."""
    place = next(place for place, placement in enumerate(tensor.placements) if placement.is_shard())
    return tensor.device_mesh.get_group(place)


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor, on every process; an ordinary tensor itself, not a copy."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor.detach()


@torch.no_grad()
def write_whole_(tensor: Tensor, value: Tensor) -> None:
    """Set a tensor in place to a value of its whole shape.

    Where it is sharded, the first process of the mesh sends each its rows: whatever the others computed, all shares are of
    one and the same value. (A singular value decomposition may differ in bits between devices that are not alike, and
    shares of two different ones would be no decomposition of anything.)
    """
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
    tensor.copy_(value)
