"""Which rows of a sharded tensor a process writes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from qvgen.training.checkpoint.part import Share
from qvgen.training.distributed.sharding import rows_of


def written_rows(rows: Tensor, *, like: DTensor) -> Share:
    """What a process writes of its rows of something that has a row for each row of a sharded tensor.

    Where several groups of processes have the same shares, those of the first group write them, and the others nothing.

    Args:
        rows: The process's own, where they lie.
        like: The sharded tensor.
    """
    mesh, place = like.device_mesh, 0
    is_first = True
    for dimension, placement in enumerate(like.placements):
        if placement.is_shard():
            place = dimension
        else:
            is_first = is_first and mesh.get_local_rank(dimension) == 0
    mine = rows_of(like.shape[0], rank=mesh.get_local_rank(place), world_size=mesh.size(place))
    assert rows.shape[0] == mine.stop - mine.start, f"{list(rows.shape)} for the rows {mine} of {list(like.shape)}"
    shape = torch.Size([like.shape[0], *rows.shape[1:]])
    return Share(rows=rows.detach() if is_first else rows.detach()[:0], shape=shape, first_row=mine.start)
