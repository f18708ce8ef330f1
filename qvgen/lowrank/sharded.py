"""Tensors of which every process holds a share, read and written whole.

    an ordinary tensor     is its own whole
    torch's DTensor        which FSDP2 makes of a Parameter: a share of the rows
    with a keeper          its master lies with somebody else (DeepSpeed), and what is written in the Parameter is lost at
                           the next optimizer step, so that the keeper reads and writes it

The functions are collectives for all but ordinary ones: every process that shares one calls them, in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


KEEPER = "qvgen_keeper"
"""Attribute of a Parameter with the :class:`Keeper` of its master."""


class Keeper(Protocol):
    """Has the masters and the moments of Parameters; all methods are collectives."""

    def whole(self, parameter: Tensor) -> Tensor:
        """The value of a parameter with which the next forward pass computes."""

    def write_(self, parameter: Tensor, value: Tensor) -> None:
        """Set a parameter, and the master that the next optimizer step begins with, to rank 0's value."""

    def forget_moments_(self, parameter: Tensor) -> None:
        """Set the moments and the step count of a parameter to 0."""


def keeper_of(tensor: Tensor) -> Keeper | None:
    """Who has the master of a Parameter; None where it is its own."""
    found: Keeper | None = getattr(tensor, KEEPER, None)
    return found


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
    if (keeper := keeper_of(tensor)) is not None:
        return keeper.whole(tensor)
    return tensor.full_tensor() if is_sharded(tensor) else tensor.detach()


@torch.no_grad()
def write_whole_(tensor: Tensor, value: Tensor) -> None:
    """Set a tensor in place to a value of its whole shape.

    Where it is sharded, the first process of the mesh sends each its rows: whatever the others computed, all shares are of
    one and the same value. (A singular value decomposition may differ in bits between devices that are not alike, and
    shares of two different ones would be no decomposition of anything.)
    """
    if (keeper := keeper_of(tensor)) is not None:
        keeper.write_(tensor, value)
        return
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
    tensor.copy_(value)
