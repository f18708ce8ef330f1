"""How the blocks of a sharded model are gathered, and where shares lie (torch.distributed.fsdp.fully_shard).

    true     forward: gather block i, compute, forget it        backward: gather block i, compute, forget it
    false    forward: gather block i, compute                   backward: compute, forget it
    g        forward: gather block i, compute, keep 1/g of it   backward: gather it among g processes, compute, forget it

Values are the same in all three, bit for bit: only copies go. A model that is called without gradients forgets all blocks
after the call, whichever of them holds: no backward pass would, and the next call would compute with what parameters were
before an optimizer step. The teacher has no backward pass and always forgets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from qvgen.config.schema.strategy import StrategyConfig
from qvgen.training.distributed.codes_gather import gather_codes_


@dataclass(frozen=True, kw_only=True)
class Gathering:
    """What ``strategy`` says of a sharded model.

    Attributes:
        reshard_after_forward: Whether a block is forgotten after its forward pass, or in how many shares it is kept.
        prefetch: Blocks that are gathered ahead of the one that computes; None: FSDP2's own choice.
        on_host: Whether shares lie in the host's memory.
        as_codes: Whether the forward pass gets codes in place of quantized layers' weights.
    """

    reshard_after_forward: bool | int = True
    prefetch: int | None = None
    on_host: bool = False
    as_codes: bool = False

    @classmethod
    def of(cls, strategy: StrategyConfig) -> Gathering:
        """A run's."""
        return cls(
            reshard_after_forward=strategy.reshard_after_forward,
            prefetch=strategy.prefetch,
            on_host=strategy.cpu_offload,
            as_codes=strategy.gather == "codes",
        )

    def __str__(self) -> str:
        """What is whole on a device at most.

        Example:
            >>> [str(Gathering(reshard_after_forward=kept)) for kept in (True, False, 8)]
            ['a block, its gradients', 'all blocks, gradients of one', 'a block, its gradients, 1/8 of all']
        """
        kept = self.reshard_after_forward
        if kept is False:
            return "all blocks, gradients of one"
        return "a block, its gradients" + ("" if kept is True else f", 1/{kept} of all")

    @property
    def without_backward(self) -> Gathering:
        """How a model without a backward pass is gathered: rows are released after use, and values are sent, not codes."""
        return replace(self, reshard_after_forward=True, as_codes=False)


def gather_by_block_(model: nn.Module, *, blocks: list[nn.Module], mesh: DeviceMesh, how: Gathering) -> None:
    """Make units of a model's blocks, and of the rest of it.

    Args:
        model: On the meta device.
        blocks: In the order in which they are computed.
        mesh: Processes that share them out.
        how: How they are gathered.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard  # a second that a plan does without

    pinned = mesh.device_type == "cuda"
    policy = CPUOffloadPolicy(pin_memory=pinned) if how.on_host else OffloadPolicy()
    for unit in (*blocks, model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=how.reshard_after_forward, offload_policy=policy)
    if how.prefetch is not None:
        units: list[Any] = list(blocks)
        for index, unit in enumerate(units):
            unit.set_modules_to_forward_prefetch(units[index + 1 : index + 1 + how.prefetch])
            unit.set_modules_to_backward_prefetch(units[max(0, index - how.prefetch) : index][::-1])
    if how.as_codes:
        gather_codes_(model, (*blocks, model))
    if how.reshard_after_forward is not True:
        model.register_forward_hook(_forget_without_backward)


def _forget_without_backward(model: nn.Module, inputs: Any, outputs: Any) -> None:
    """Give back what a call without gradients has left whole."""
    from torch.distributed.fsdp import FSDPModule

    del inputs, outputs
    if not torch.is_grad_enabled():
        for unit in model.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()
