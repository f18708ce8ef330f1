"""Masters and moments that DeepSpeed has (ZeRO-2), read and written by its own accessors.

    rank r of R     float32 masters and both moments of 1/R of each group of parameters, laid out flat, one after another
    every rank      the module's Parameters are whole: copies, which each step fills from the masters

What is written in a Parameter is lost at the next step, since DeepSpeed steps its own masters. So a value goes to both, the
master and the module's copy; it is read back at once, and again after the next step, where it can have moved no further than
one step of AdamW without moments moves it. A difference is an error.

DeepSpeed keeps one step count for a group of the optimizer where torch has one for each parameter: the moments of a group are
forgotten together, as Phi's are, of which all layers lose rank in the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from qvgen.lowrank.sharded import KEEPER
from qvgen.training.distributed.sharding import rows_of

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Tensors of AdamW's state with a number for each of a parameter."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Written:
    """A value that was written, and the group of its parameter."""

    parameter: nn.Parameter
    value: Tensor
    group: int


class ZeroKeeper:
    """Reads and writes what DeepSpeed's engine has of a module's parameters.

    Args:
        engine: ``deepspeed.initialize``'s.
        groups: The parameters of each group of the optimizer, as they were before DeepSpeed took them.
    """

    def __init__(self, engine: Any, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        import deepspeed

        self._deepspeed, self._engine = deepspeed, engine
        self.groups = [list(group) for group in groups]
        self._group_of = {id(parameter): number for number, group in enumerate(groups) for parameter in group}
        self._forgotten: list[set[int]] = [set() for _ in groups]
        self._written: dict[int, _Written] = {}
        self._linked = False
        self._parameters = list(engine.module.parameters())
        for parameter in self._parameters:
            setattr(parameter, KEEPER, self)

    def release(self) -> None:
        """Leave the parameters to themselves."""
        for parameter in self._parameters:
            delattr(parameter, KEEPER)

    def whole(self, parameter: Tensor) -> Tensor:
        """See :class:`qvgen.lowrank.sharded.Keeper`."""
        return parameter.detach()

    @torch.no_grad()
    def write_(self, parameter: Tensor, value: Tensor) -> None:
        """See :class:`qvgen.lowrank.sharded.Keeper`; raises RuntimeError where what is read back is another value."""
        assert isinstance(parameter, nn.Parameter)
        value = value.detach().to(device=self._engine.device, dtype=torch.float32).contiguous().clone()
        distributed.broadcast(value, src=0)
        self._deepspeed.utils.safe_set_full_fp32_param(parameter, value)
        parameter.copy_(value)
        if not (torch.equal(self._master(parameter), value) and torch.equal(parameter, value)):
            raise RuntimeError(f"DeepSpeed did not take a value of a parameter of shape {list(value.shape)}")
        written = _Written(parameter=parameter, value=value, group=self._group_of[id(parameter)])
        self._written[id(parameter)] = written

    @torch.no_grad()
    def forget_moments_(self, parameter: Tensor) -> None:
        """See :class:`qvgen.lowrank.sharded.Keeper`; the step count goes to 0 with the last parameter of a group."""
        group = self._group_of[id(parameter)]
        if not (state := self._state(group)):
            return
        for name in MOMENTS:
            self.set_moment_(parameter, name, torch.zeros_like(parameter))
        self._forgotten[group].add(id(parameter))
        if len(self._forgotten[group]) == len(self.groups[group]):
            self._forgotten[group].clear()
            state["step"].zero_()

    def before_step(self) -> None:
        """Raise RuntimeError where some parameters of a group have forgotten their moments, and others have not."""
        for group, forgotten in zip(self.groups, self._forgotten, strict=True):
            if forgotten:
                raise RuntimeError(
                    f"{len(forgotten)} of {len(group)} parameters of a group of the optimizer begin anew: DeepSpeed has one "
                    "step count for all of them; write strategy=fsdp"
                )

    @torch.no_grad()
    def after_step(self) -> None:
        """Raise RuntimeError where the step did not begin with a value that was written, or the module has another one."""
        if not self._linked:
            for group in range(len(self.groups)):
                self._link(group)
            self._linked = True
        written, self._written = self._written, {}
        for entry in written.values():
            options, now = self._engine.optimizer.optimizer.param_groups[entry.group], self.whole(entry.parameter)
            limit = options["lr"] * (1.001 + options["weight_decay"] * entry.value.abs()) + 1e-6 * entry.value.abs()
            if not (torch.equal(self._master(entry.parameter), now) and ((now - entry.value).abs() <= limit).all()):
                raise RuntimeError(
                    f"DeepSpeed lost a value of a parameter of shape {list(now.shape)} in the step after it was written: it "
                    f"moved by up to {float((now - entry.value).abs().max()):.3g} at the learning rate {options['lr']:.3g}"
                )

    def rows(self, parameter: Tensor) -> slice:
        """Which rows of a parameter this process writes to a checkpoint."""
        return rows_of(len(parameter), rank=distributed.get_rank(), world_size=distributed.get_world_size())

    def moment(self, parameter: Tensor, name: str) -> Tensor:
        """One of :data:`MOMENTS`, whole; a collective."""
        found: Tensor = self._deepspeed.utils.safe_get_full_optimizer_state(parameter, name)
        return found

    @torch.no_grad()
    def set_moment_(self, parameter: Tensor, name: str, value: Tensor) -> None:
        """Set one of :data:`MOMENTS`; all processes have the same value."""
        value = value.to(device=self._engine.device, dtype=torch.float32)
        self._deepspeed.utils.safe_set_full_optimizer_state(parameter, value, name)

    def step_count(self, group: int) -> float | None:
        """Steps that a group has done since its moments were forgotten; None before the first."""
        state = self._state(group)
        return float(state["step"]) if state else None

    @torch.no_grad()
    def begin_states_(self, group: int, *, step: float) -> None:
        """Make the state of a group's moments, all of them 0, as the optimizer does in its first step."""
        flat, optimizer = self._flat(group), self._engine.optimizer.optimizer
        is_fused = optimizer.param_groups[group].get("fused")
        count = torch.tensor(float(step), device=flat.device if is_fused else "cpu")
        optimizer.state[flat] = {"step": count, **{name: torch.zeros_like(flat) for name in MOMENTS}}
        self._link(group)

    def _link(self, group: int) -> None:
        """Have DeepSpeed's accessors find a group's moments: it links all in its first step of one, when others have none."""
        optimizer = self._engine.optimizer
        self._deepspeed.utils.lazy_init_hp_params_optimizer_state(
            optimizer.bit16_groups[group], self._flat(group), optimizer.optimizer.state
        )

    def _master(self, parameter: Tensor) -> Tensor:
        found: Tensor = self._deepspeed.utils.safe_get_full_fp32_param(parameter)
        return found

    def _state(self, group: int) -> dict[str, Tensor]:
        """The optimizer's state of a group's flat masters; empty before the first step."""
        return self._engine.optimizer.optimizer.state.get(self._flat(group)) or {}

    def _flat(self, group: int) -> Tensor:
        """This process's share of a group's masters."""
        found: Tensor = self._engine.optimizer.single_partition_of_fp32_groups[group]
        return found
