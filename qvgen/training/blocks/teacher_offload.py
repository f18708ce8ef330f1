"""A frozen model whose blocks lie on the host and come to the device one after another (``strategy.teacher_offload``).

    before block i      its tensors have arrived; those of block i + 1 set out
    after block i       its tensors are the host's again

What is in no block (embeddings, the last layer) and all buffers stay on the device. The forward pass computes what it
computes anywhere, to the bit. A GPU holds up to three blocks: the one that computes, the next, and the last
one's memory until both streams are done with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qvgen.errors import UserError
from qvgen.training.distributed.sharding import blocks_of
from qvgen.training.optim.host_stream import HostStream, to_host

BLOCKS_ON_DEVICE = 3


class OffloadedBlocks:
    """Brings a model's blocks to a device and back while it is called without gradients.

    Args:
        model: Frozen; its blocks' parameters stay on, or go to, the host, all else goes to the device.
        device: Where it computes.

    Raises:
        UserError: The model has no list of blocks.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        blocks = blocks_of(model)
        if not blocks:
            raise UserError(
                f"{type(model).__name__} has no list of blocks to keep on the host; write strategy.teacher_offload=false"
            )
        inside = {id(parameter) for block in blocks for parameter in block.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in inside:
                parameter.data = parameter.data.to(device)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        self._parameters = [list(block.parameters()) for block in blocks]
        self._homes = [[_at_home(parameter, device) for parameter in block] for block in self._parameters]
        for block, homes in zip(self._parameters, self._homes, strict=True):
            _set_(block, homes)
        self._stream = HostStream(device)
        self._ahead: tuple[int, Any] | None = None
        self._handles: list[RemovableHandle] = []
        for index, block in enumerate(blocks):
            self._handles.append(block.register_forward_pre_hook(self._arriving(index), prepend=True))
            self._handles.append(block.register_forward_hook(self._leaving(index), always_call=True))

    def remove(self) -> None:
        """Leave the model without hooks, its blocks on the host."""
        while self._handles:
            self._handles.pop().remove()
        self._ahead = None

    def _arriving(self, index: int) -> Any:
        def hook(block: nn.Module, inputs: Any) -> None:
            del block, inputs
            is_here = self._ahead is not None and self._ahead[0] == index
            fetched = self._ahead[1] if is_here and self._ahead else self._stream.fetch(self._homes[index])
            following = index + 1
            self._ahead = (
                (following, self._stream.fetch(self._homes[following])) if following < len(self._homes) else None
            )
            _set_(self._parameters[index], self._stream.arrived(fetched))

        return hook

    def _leaving(self, index: int) -> Any:
        def hook(block: nn.Module, inputs: Any, outputs: Any) -> None:
            del block, inputs, outputs
            _set_(self._parameters[index], self._homes[index])

        return hook


def _at_home(parameter: nn.Parameter, device: torch.device) -> Tensor:
    """A parameter's values on the host: its own memory where that will do."""
    if parameter.device.type == "cpu" and device.type != "cuda":
        return parameter.data
    return to_host(parameter.data, is_pinned=device.type == "cuda")


def _set_(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value
