"""Lightning's strategy for sharded models, with checkpoints that all processes write together.

Each process writes its own rows of weights, moments and average (:mod:`qvgen.training.checkpoint.folder`): none ever holds
more than its share on the device, nor more than one copy of it on the host, from which a thread writes. When a run goes on,
every process maps the files and reads the rows that are its own now, whoever wrote them; it reads the files of a single
process or of ``strategy=ddp`` in the same way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from qvgen.training.checkpoint.saved_tensor import SavedTensor
from qvgen.training.distributed.sharding import grouped_mesh, share_of
from qvgen.training.distributed.writes_folders import WritesFolders
from qvgen.training.distributed.written_rows import written_rows


class ShardedStrategy(WritesFolders, ModelParallelStrategy):
    """Data parallel over sharded parameters; arguments as Lightning's, ``data_parallel_size`` must be given.

    Attributes:
        shards: Processes of a group that holds a whole model together; 0: all of them.
        node_rank: The node of this process.
    """

    shards, node_rank = 0, 0

    def sharing_mesh(self) -> DeviceMesh:
        """Over which processes parameters are shared out: all, or groups that hold the same; a collective."""
        if self.shards in (0, self.world_size):
            assert self.device_mesh is not None
            return self.device_mesh["data_parallel"]
        return grouped_mesh(self.root_device.type, shards=self.shards, node_rank=self.node_rank)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Sharded tensors, and whole buffers."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """As the optimizer's own state dict, with this process's shares of the moments where they lie."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)  # Lightning's wrapper
        state = optimizer.state_dict()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        found = {
            index: {name: _moment(value, like=parameters[index]) for name, value in entry.items()}
            for index, entry in state["state"].items()
        }
        return {**state, "state": found}

    def shares_of(self, checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
        """This process's rows in place of each sharded tensor."""
        found: Mapping[str, Any] = _shares(checkpoint)
        return found

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copy this process's rows into the sharded module."""
        assert self.lightning_module is not None
        here = self.lightning_module.state_dict()
        state = {name: _share(value, like=here.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Copy this process's rows of the moments."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                index: {name: _share(value, like=parameters[index]) for name, value in entry.items()}
                for index, entry in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def _share(value: Any, *, like: Any) -> Any:
    """The rows of a tensor that is sharded, or has a row for each of its rows; else (a step count, a buffer) all of it."""
    is_tensor = isinstance(value, Tensor | SavedTensor)
    if isinstance(like, DTensor) and is_tensor and value.shape[:1] == like.shape[:1]:
        return share_of(value, like=like)
    return value.whole() if isinstance(value, SavedTensor) else value


def _moment(value: Any, *, like: Any) -> Any:
    """What is written of something that may have a row for each row of a sharded parameter."""
    is_share = isinstance(like, DTensor) and isinstance(value, Tensor) and not isinstance(value, DTensor) and value.ndim
    return written_rows(value, like=like) if is_share else value


def _shares(value: Any) -> Any:
    """Nested values with what this process writes of each sharded tensor in its place."""
    if isinstance(value, DTensor):
        return written_rows(value.to_local(), like=value)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _shares(entry)) for key, entry in value.items())
    if type(value) in (list, tuple):
        return type(value)(_shares(entry) for entry in value)
    return value
