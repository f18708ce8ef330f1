"""Models whose parameters are shared out over the processes of a run (FSDP2, torch.distributed.fsdp.fully_shard).

    rank 0     a model with its weights, on the host
                 |  the same model on the meta device, on every rank: its blocks become units, then the rest is one
                 |  each rank reads its rows from a file that all see, once rank 0 has given its memory back; or, where there
                 |  is none, rank 0 sends each tensor, rank by rank its rows: no other process ever holds a whole model
    rank r     rows [r n/R, (r + 1) n/R) of each parameter [n, ...]; buffers whole

Where not even rank 0 holds a model, each rank reads the rows of all (:mod:`qvgen.training.distributed.file_shares`).

A unit's parameters are gathered when it is entered, forward and backward, and given back when it is left
(:mod:`qvgen.training.distributed.gathering` has other ways); gradients are averaged and shared out by unit, after every
micro-batch (whole ones would not fit). Outside of both passes every parameter is a share, so whatever acts between optimizer
steps sees shares alone (``reshard_after_forward`` is on for the root too).
What is gathered has the parameters' own dtype: the quantizers' arithmetic needs the float32 masters, and a
MixedPrecisionPolicy would hand them bfloat16.

With ``strategy=hsdp`` a group of processes shares the rows, and every group holds all of them: a unit is gathered inside
the group alone, and its gradients are averaged inside the group and then, share by share, over the groups. R is the size of
a group then.

Left out: tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from qvgen.errors import UnfitEnvironmentError
from qvgen.lowrank.sharded import is_sharded, shard_group, whole, write_whole_
from qvgen.training.checkpoint.saved_tensor import SavedTensor
from qvgen.training.distributed.gathering import Gathering, gather_by_block_

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """A transformer's blocks: the entries of the lists that are its direct children."""
    return [block for child in model.children() if isinstance(child, nn.ModuleList) for block in child]


def grouped_mesh(device_type: str, *, shards: int, node_rank: int) -> DeviceMesh:
    """Groups of processes that are as near to each other as they can be, beside groups of their like; a collective.

    Ranks are ordered by node: a launcher may deal them out over the nodes in turn.

    Args:
        device_type: ``cuda`` or ``cpu``.
        shards: Processes of a group.
        node_rank: The node of this process.

    Returns:
        Dimensions ``replicate`` (the same shares) and ``shard`` (of one whole).
    """
    nodes: list[int] = [0] * distributed.get_world_size()
    distributed.all_gather_object(nodes, node_rank)
    return DeviceMesh(
        device_type, torch.tensor(by_node(nodes)).reshape(-1, shards), mesh_dim_names=("replicate", "shard")
    )


def by_node(nodes: Sequence[int]) -> list[int]:
    """Ranks, those of a node side by side, from the node of each rank.

    Example:
        >>> by_node([0, 1, 0, 1])
        [0, 2, 1, 3]
    """
    return sorted(range(len(nodes)), key=lambda rank: (nodes[rank], rank))


def share_out_(
    model: nn.Module,
    *,
    source: nn.Module | None,
    mesh: DeviceMesh,
    device: torch.device,
    file: Path | None = None,
    how: Gathering | None = None,
) -> None:
    """Shard a model over a mesh and give it the tensors of another; a collective.

    Args:
        model: On the meta device; each process keeps its rows of every parameter, and all of every buffer.
        source: On rank 0, the model whose tensors it gets; None elsewhere.
        mesh: The processes.
        device: Where this process computes, and its shares go unless ``how`` keeps them on the host.
        file: A safetensors file of the source's parameters that all processes see: each reads its rows there, and the source
            goes to the meta device before. None: rank 0 sends them, and the source stays.
        how: How blocks are gathered; None: each when it is entered.

    Raises:
        ValueError: The model has no blocks.
        RuntimeError: The source has other parameters than the model.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no list of blocks to shard; use strategy=ddp")
    _take_dtypes_(model, source)
    how = how or Gathering()
    gather_by_block_(model, blocks=blocks, mesh=mesh, how=how)
    buffers = {} if source is None else dict(source.named_buffers())
    if file is not None and source is not None:
        source.to("meta")
    model.to_empty(device=torch.device("cpu") if how.on_host else device)
    if file is not None:
        with safe_open(file, framework="pt") as content:
            read_rows_(model, content.get_slice)
    else:
        _send_rows_(model, source, device=device)
    _take_buffers_(model, buffers, device=device)


@torch.no_grad()
def read_rows_(model: nn.Module, value_of: Callable[[str], Any]) -> None:
    """Read this process's rows of every parameter; no collective.

    Args:
        model: Sharded.
        value_of: Name -> what gives rows for a slice: a tensor, or one that stays in its file.
    """
    for name, parameter in model.named_parameters():
        assert is_sharded(parameter), f"{name} is not sharded"
        share, group = parameter.to_local(), shard_group(parameter)
        place = {"rank": distributed.get_rank(group), "world_size": distributed.get_world_size(group)}
        if share.numel():
            share.copy_(value_of(name)[rows_of(parameter.shape[0], **place)])


def _send_rows_(model: nn.Module, source: nn.Module | None, *, device: torch.device) -> None:
    """Send every parameter from rank 0, one after another; a collective."""
    given = {} if source is None else dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        if source is not None:
            value = given[name].detach().to(device)
        else:  # receives its rows; nobody reads these numbers
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        write_whole_(parameter, value)


def _take_dtypes_(model: nn.Module, source: nn.Module | None) -> None:
    """The source's dtypes, which a family may choose by its own rules, on the meta device."""
    found = [] if source is None else [(name, p.shape, p.dtype) for name, p in source.named_parameters()]
    wanted = {name: (shape, dtype) for name, shape, dtype in _from_rank_zero(found)}
    here = dict(model.named_parameters())
    if {name: p.shape for name, p in here.items()} != {name: shape for name, (shape, _) in wanted.items()}:
        raise UnfitEnvironmentError(
            f"rank 0 has another {type(model).__name__} than this process; start all from one version"
        )
    for name, parameter in here.items():
        parameter.data = parameter.data.to(wanted[name][1])


def _take_buffers_(model: nn.Module, found: Mapping[str, Tensor], *, device: torch.device) -> None:
    """Rank 0's buffers, also those that are in no state dict (positions that a model computes when it is built)."""
    for name, shape, dtype in _from_rank_zero([(name, b.shape, b.dtype) for name, b in found.items()]):
        buffer = torch.empty(shape, dtype=dtype, device=device)
        if name in found:
            buffer.copy_(found[name])
        distributed.broadcast(buffer, src=0)
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._buffers[leaf] = buffer


def _from_rank_zero(value: list[tuple[str, torch.Size, torch.dtype]]) -> list[tuple[str, torch.Size, torch.dtype]]:
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


@torch.no_grad()
def gather_(model: nn.Module, *, target: nn.Module | None) -> None:
    """Put a sharded model's tensors together on the host of one process, one after another; a collective.

    Args:
        model: Sharded.
        target: On rank 0, the model without shards (its tensors may be on the meta device) that gets them; None elsewhere.
    """
    found = {}
    for name, tensor in {**dict(model.named_buffers()), **model.state_dict()}.items():
        value = whole(tensor)
        if target is not None:  # the others take part and keep nothing
            found[name] = value.cpu()
    if target is not None:
        kept = target.state_dict().keys()
        target.load_state_dict({name: found[name] for name in kept}, strict=True, assign=True)
        for name in found.keys() - kept:  # buffers that are in no state dict
            parent, _, leaf = name.rpartition(".")
            target.get_submodule(parent)._buffers[leaf] = found[name]


def rows_of(size: int, *, rank: int, world_size: int) -> slice:
    """Which of ``size`` rows a process holds: equal shares, the last ones shorter or empty (torch.chunk's rule).

    Example:
        >>> [rows_of(10, rank=rank, world_size=4) for rank in range(4)]
        [slice(0, 3, None), slice(3, 6, None), slice(6, 9, None), slice(9, 10, None)]
        >>> rows_of(1, rank=1, world_size=2)
        slice(1, 1, None)
    """
    share = -(-size // world_size)
    return slice(min(rank * share, size), min((rank + 1) * share, size))


def share_of(value: Tensor | SavedTensor, *, like: DTensor) -> DTensor:
    """This process's rows of a whole tensor, as a tensor that is sharded as another of as many rows; no collective.

    Only the rows are read: ``value`` may be a file that is mapped to memory, or lie in several.
    """
    assert value.shape[0] == like.shape[0], f"{list(value.shape)} for {list(like.shape)}"
    group = shard_group(like)
    rows = value[
        rows_of(value.shape[0], rank=distributed.get_rank(group), world_size=distributed.get_world_size(group))
    ]
    return sharded_as(rows.to(device=like.to_local().device, copy=True), like=like)


def sharded_as(rows: Tensor, *, like: DTensor) -> DTensor:
    """This process's rows of a tensor that has a row for each row of another one, as a tensor that is sharded as that one."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size([like.shape[0], *rows.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    rows = rows.to(like.to_local().device)
    return DTensor.from_local(rows, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def add_gradients_by_block_(model: nn.Module) -> list[RemovableHandle]:
    """Make a model that is not sharded add gradients in the order of a sharded one.

    What several blocks read, such as the embedding of the text, gets a sum of gradients. FSDP2 passes a unit's inputs through
    a node of its own, so that the parts of one block are added first, and then blocks; without such nodes the parts are added
    one by one. Both are right; this makes the strategies train the same bits. It costs neither memory nor operations.

    Returns:
        What undoes it.
    """

    def own(value: Any) -> Any:
        return value.view_as(value) if isinstance(value, Tensor) and value.requires_grad else value

    def hook(block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        del block
        return tree_map(own, args), tree_map(own, kwargs)

    return [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks_of(model)]
