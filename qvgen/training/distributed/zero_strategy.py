"""Lightning's DeepSpeedStrategy (``strategy=deepspeed``): ZeRO-2 over float32 masters, with our checkpoints.

    whole model on each host    from the start's file, or a checkpoint
    deepspeed.initialize        masters, gradients and moments are shared out
    training                    steps and clipping by DeepSpeed; Phi's rank by :mod:`qvgen.training.distributed.zero_keeper`
    checkpoint                  each process writes its rows of weights and moments: the format of every other strategy
    end of training             the weights are whole on each host again

Weights are float32, and on a GPU the passes are autocast by DeepSpeed's ``torch_autocast``: its ``bf16`` would hand rounded
weights to the quantizers. DeepSpeed's own checkpoints are pickles, which nothing here reads or writes.
"""

from __future__ import annotations

import logging
import math
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn

from qvgen.training.checkpoint.part import Share
from qvgen.training.checkpoint.saved_tensor import whole_values
from qvgen.training.distributed.writes_folders import WritesFolders
from qvgen.training.distributed.zero_check import BUCKET
from qvgen.training.distributed.zero_keeper import MOMENTS, ZeroKeeper
from qvgen.training.optimizer_module import OptimizerModule

LOCAL_RANK = "LOCAL_RANK"
"""The variable by which DeepSpeed finds its device, whenever it looks for it."""


class FloatMasters(DeepSpeedPrecision):
    """Lightning's part of the precision: it leaves modules and batches as they are, and the engine does what it does."""

    def __init__(self) -> None:
        super().__init__("32-true")

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Itself."""
        return module

    def convert_input(self, data: Any) -> Any:
        """Itself."""
        return data

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Of a loss that Lightning has divided by the micro-batches already: the engine would divide it again."""
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)


def zero_config(*, on_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's configuration of a run, but for the numbers that Lightning adds: accumulation and clipping.

    Args:
        on_gpu: Whether passes are autocast to bfloat16, and gradients sent while others are computed.

    Example:
        >>> zero_config(on_gpu=True)["zero_optimization"]["stage"]
        2
    """
    zero = {
        "stage": 2,
        "contiguous_gradients": True,
        "overlap_comm": on_gpu,
        "reduce_scatter": True,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return {
        "train_micro_batch_size_per_gpu": 1,  # for its log of clips per second, which is left out
        "steps_per_print": 2**40,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        **({"torch_autocast": autocast} if on_gpu else {}),
    }


class ZeroStrategy(WritesFolders, DeepSpeedStrategy):
    """ZeRO-2 over the parameters of a LightningModule that is whole in every process.

    Args:
        on_gpu: Whether processes compute on GPUs.
        given: Further arguments of Lightning's strategy.

    Attributes:
        keeper: Reads and writes masters and moments; None outside of training.
    """

    keeper: ZeroKeeper | None = None

    def __init__(self, *, on_gpu: bool, **given: Any) -> None:
        super().__init__(
            config=zero_config(on_gpu=on_gpu), precision_plugin=FloatMasters(), logging_level=logging.ERROR, **given
        )
        self._variable: str | None = None

    def setup_environment(self) -> None:
        """As the strategy that Lightning's derives from; its own refuses CPUs, on which DeepSpeed itself runs."""
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """Join the processes' group as with other strategies, and have DeepSpeed take it."""
        import deepspeed

        DDPStrategy.setup_distributed(self)
        self._variable = os.environ.get(LOCAL_RANK)
        os.environ[LOCAL_RANK] = str(self.local_rank)
        if self.root_device.type == "cpu":
            # An operator for shared memory, which DeepSpeed would compile in a folder of the user's: a process that is
            # killed meanwhile leaves a lock there, for which every later start waits.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=self._process_group_backend, auto_mpi_discovery=False, verbose=False)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Nothing: the module is there, and whole."""
        yield

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        """Remember the groups that the optimizer has, and give what only the engine knows to the keeper."""
        import deepspeed

        assert isinstance(self.lightning_module, OptimizerModule)
        self.lightning_module.clips = False
        groups = [list(group["params"]) for group in optimizer.param_groups]
        engine, wrapped, _, _ = deepspeed.initialize(  # Lightning would give it the number of a GPU: a CPU has none
            args=Namespace(device_rank=self.local_rank),
            config=self.config,
            model=model,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        self.keeper = ZeroKeeper(engine, groups)
        return engine, wrapped

    def optimizer_step(
        self, optimizer: Any, closure: Callable[[], Any], model: Any | None = None, **kwargs: Any
    ) -> Any:
        """One micro-batch, and with the last one a step; raises RuntimeError where a value that was written is lost."""
        assert self.keeper is not None
        engine = self.deepspeed_engine
        before = engine.global_steps
        self.keeper.before_step()
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        if engine.global_steps != before:
            norm = engine.get_global_grad_norm()
            assert isinstance(self.lightning_module, OptimizerModule)
            self.lightning_module.take_norm(torch.as_tensor(math.inf if norm is None else norm, dtype=torch.float32))
            self.keeper.after_step()
        return result

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Of each parameter the rows that this process writes; buffers whole."""
        assert self.lightning_module is not None
        found = self.lightning_module.state_dict(keep_vars=True)
        return {name: self._share(value) for name, value in found.items()}

    def _share(self, value: Tensor) -> Tensor | Share:
        assert self.keeper is not None
        if not isinstance(value, nn.Parameter):
            return value.detach()
        return self._rows(self.keeper.whole(value), like=value)

    def _rows(self, whole: Tensor, *, like: Tensor) -> Tensor | Share:
        """What this process writes of a tensor that has a number for each of a parameter."""
        assert self.keeper is not None
        if not whole.ndim:
            return whole
        rows = self.keeper.rows(like)
        mine = whole[rows] if whole.data_ptr() == like.data_ptr() else whole[rows].clone()
        return Share(rows=mine, shape=whole.shape, first_row=rows.start)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """As torch's state dict of the optimizer before DeepSpeed took it, with this process's rows of the moments."""
        del optimizer
        assert self.keeper is not None
        keeper, inner = self.keeper, self.deepspeed_engine.optimizer.optimizer
        state: dict[int, dict[str, Any]] = {}
        groups, first = [], 0
        for number, parameters in enumerate(keeper.groups):
            places = range(first, first + len(parameters))
            first += len(parameters)
            options = {name: value for name, value in inner.param_groups[number].items() if name != "params"}
            groups.append({**options, "params": list(places)})
            if (step := keeper.step_count(number)) is None:
                continue
            for place, parameter in zip(places, parameters, strict=True):
                moments = {name: self._rows(keeper.moment(parameter, name), like=parameter) for name in MOMENTS}
                state[place] = {"step": torch.tensor(step), **moments}
        return {"state": state, "param_groups": groups}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Fill the module, before DeepSpeed copies its masters."""
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(whole_values(dict(checkpoint["state_dict"])), strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Fill this process's share of the moments, whoever wrote them."""
        assert self.keeper is not None
        (saved,), keeper = checkpoint["optimizer_states"], self.keeper
        place = 0
        for number, parameters in enumerate(keeper.groups):
            entries = [saved["state"].get(place + index, {}) for index in range(len(parameters))]
            place += len(parameters)
            options = self.deepspeed_engine.optimizer.optimizer.param_groups[number]
            given = saved["param_groups"][number]
            options.update({name: given[name] for name in ("lr", "initial_lr") if name in given})
            if not any(entries):
                continue
            keeper.begin_states_(number, step=max(float(entry["step"]) for entry in entries if entry))
            for parameter, entry in zip(parameters, entries, strict=True):
                for name in MOMENTS:
                    if name in entry:
                        keeper.set_moment_(parameter, name, whole_values(entry[name]))

    def on_train_end(self) -> None:
        """Give each process the trained weights, on its host, as Parameters of their own; a collective."""
        assert self.keeper is not None
        assert self.lightning_module is not None
        keeper, engine, module = self.keeper, self.deepspeed_engine, self.lightning_module
        made: dict[int, nn.Parameter] = {}
        values = {id(p): keeper.whole(p).to("cpu", copy=True) for p in module.parameters()}
        flags = {id(p): p.requires_grad for p in module.parameters()}
        keeper.release()
        engine.destroy()
        for parent in module.modules():
            for name, old in parent._parameters.items():
                if old is not None:
                    key = id(old)
                    made.setdefault(key, nn.Parameter(values[key], requires_grad=flags[key]))
                    parent._parameters[name] = made[key]
        self.keeper, self.model = None, module

    def teardown(self) -> None:
        """Take back the variable, which the next job of a sweep would take for a launcher's."""
        super().teardown()
        os.environ.pop(LOCAL_RANK, None)
        if self._variable is not None:
            os.environ[LOCAL_RANK] = self._variable
