"""Lightning's strategy for sharded models, with the checkpoints of the other strategies.

Checkpoints are those of one process: one file of whole tensors and plain values, written by rank 0, whole or not there,
readable without executing anything. Rank 0 gathers tensor by tensor, so that no device holds more than one whole; its host
holds 12 bytes per trained parameter while it writes (173 GB for 14.4 x 10^9). Every process maps the file and reads its own
rows when it resumes. torch's distributed checkpoint would write in parallel and need no such host memory, but its index is a
pickle, which reading executes, and ``qvgen fold`` would need a reader of its own (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from qvgen.lowrank.sharded import whole
from qvgen.training.distributed.sharding import grouped_mesh, sharded_as, share_of


class ShardedStrategy(ModelParallelStrategy):
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

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """False: configure_model has sharded the model before, and on_fit_start has to find it restored."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: it is restored by :meth:`load_optimizer_state_dict`."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors on the host of rank 0; nothing elsewhere. A collective."""
        assert self.lightning_module is not None
        return self._whole_tensors(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """As the optimizer's own state dict, of whole tensors on the host of rank 0. A collective."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)  # Lightning's wrapper
        state = optimizer.state_dict()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        found = {
            index: self._whole_tensors({name: _sharded(value, like=parameters[index]) for name, value in entry.items()})
            for index, entry in state["state"].items()
        }
        return {**state, "state": found}

    def _whole_tensors(self, values: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for name, value in values.items():
            complete = whole(value) if isinstance(value, Tensor) else value
            if self.is_global_zero:
                found[name] = complete.cpu() if isinstance(complete, Tensor) else complete
        return found

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write one file, as rank 0."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Map the file; tensors are read when their rows are copied."""
        del weights_only
        loaded: dict[str, Any] = self.checkpoint_io.load_checkpoint(checkpoint_path)
        return loaded

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
    """The rows of a tensor that is sharded, or has a row for each of its rows; else (a step count, a buffer) as it is."""
    if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape[:1] == like.shape[:1]:
        return share_of(value, like=like)
    return value


def _sharded(value: Any, *, like: Any) -> Any:
    """A plain share of something that has a row for each row of a sharded parameter, as the sharded tensor that it is."""
    if isinstance(like, DTensor) and isinstance(value, Tensor) and not isinstance(value, DTensor) and value.ndim:
        return sharded_as(value, like=like)
    return value
