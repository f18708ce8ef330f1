"""AdamW one tensor at a time: moments of float32 or 8 bits, on the device or the host, masters of float32 or bfloat16.

    w, g  ->  float32                           what is stored narrower
    m, v  ->  the device                        where they lie on the host (:mod:`qvgen.training.optim.host_stream`)
    w, m, v  <-  AdamW(w, g, m, v)              torch's, or torchao's for moments of 8 bits
    w  <-  up or down by chance                 for masters of bfloat16

With float32 throughout it gives the bits of torch.optim.AdamW, wherever the moments lie. Its state is plain tensors, which a
checkpoint holds as it holds those of torch's: ``step``, ``exp_avg``, ``exp_avg_sq`` (float32, or codes in uint8) and, beside
codes, ``exp_avg_scale`` and ``exp_avg_sq_scale``. Of a sharded parameter it is this process's share, an ordinary tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from qvgen.lowrank.sharded import is_sharded
from qvgen.training.optim.eight_bit import EightBitMoment, block_size, eight_bit_step_
from qvgen.training.optim.host_stream import HostStream, to_host
from qvgen.training.optim.stochastic_rounding import round_stochastically, rounding_generator

EIGHT_BIT_GROUP = "weights"
"""The optimizer's group whose moments may have 8 bits; all others are small."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


class StreamedAdamW(torch.optim.Optimizer):
    """AdamW with a narrower or farther state.

    Args:
        groups: As for :func:`qvgen.training.optim.optimizer.build_optimizer`.
        betas: Decay rates of the moments.
        eps: Number beside the root of the second moment.
        eight_bit: Keep moments of the group ``weights`` in 8 bits.
        offload: Keep moments in the host's memory.
        seed: Of the rounding of bfloat16 parameters.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        eight_bit: bool = False,
        offload: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__([dict(group) for group in groups], {"betas": betas, "eps": eps})
        self.eight_bit, self.offload, self.seed = eight_bit, offload, seed

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step with the gradients that are there."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    def _step(self) -> None:
        parameters = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        trained = [
            (group, index, parameter)
            for index, (group, parameter) in enumerate(parameters)
            if parameter.grad is not None
        ]
        states = [self._state(parameter, group) for group, _, parameter in trained]
        for state in states:
            state["step"].add_(1)
        homes = [[value for name, value in sorted(state.items()) if name != "step"] for state in states]
        device = local(trained[0][2]).device if trained else torch.device("cpu")
        visits = HostStream(device).visits(homes) if self.offload else iter(homes)
        # The visits first: they take the last moments home when they are asked for more.
        for here, (group, index, parameter), state in zip(visits, trained, states, strict=True):
            names = sorted(name for name in state if name != "step")
            moments = dict(zip(names, here, strict=True))
            if local(parameter).numel():  # else another process has all rows; the state is there all the same
                self._update(parameter, group, moments, step=state["step"], tensor=index)

    def _state(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            value = local(parameter).detach()
            block = block_size(parameter.shape) if self.eight_bit and group.get("name") == EIGHT_BIT_GROUP else None
            state["step"] = torch.tensor(0.0)
            for name, signed in zip(_MOMENTS, (True, False), strict=True):
                if block is None:
                    state[name] = self._home(torch.zeros_like(value, dtype=torch.float32))
                else:
                    moment = EightBitMoment.zeros(value, block=block, signed=signed)
                    state[name], state[f"{name}_scale"] = self._home(moment.codes), self._home(moment.scale)
        return state

    def _home(self, value: Tensor) -> Tensor:
        """Where a moment lies between steps."""
        return to_host(value, is_pinned=value.device.type == "cuda") if self.offload else value

    def _update(
        self,
        parameter: nn.Parameter,
        group: dict[str, Any],
        moments: Mapping[str, Tensor],
        *,
        step: Tensor,
        tensor: int,
    ) -> None:
        stored, gradient = local(parameter).detach(), local(parameter.grad).float()
        value = stored.float()
        if "exp_avg_scale" in moments:
            first, second = (
                EightBitMoment(codes=moments[name], scale=moments[f"{name}_scale"], signed=name == "exp_avg")
                for name in _MOMENTS
            )
            eight_bit_step_(value, gradient, (first, second), step=step, group=group)
        else:
            is_cuda = value.device.type == "cuda"
            before = step - 1  # torch counts it again
            adamw(
                [value], [gradient], *([moments[name]] for name in _MOMENTS), [],
                [before.to(value.device) if is_cuda else before],
                foreach=not is_cuda, fused=is_cuda, amsgrad=False, maximize=False,
                beta1=group["betas"][0], beta2=group["betas"][1],
                lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            )  # fmt: skip
        if stored.dtype == torch.bfloat16:
            key = {"seed": self.seed, "step": int(step), "tensor": tensor}
            stored.copy_(round_stochastically(value, generator=rounding_generator(value.device, **key)))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Take over a state; torch's own way would bring codes to the parameters' type and moments to their device."""
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, entry in state_dict["state"].items():
            device = local(parameters[index]).device
            self.state[parameters[index]] = {
                name: value.clone() if name == "step" else self._taken_home(local(value), device)
                for name, value in entry.items()
            }

    def _taken_home(self, value: Tensor, device: torch.device) -> Tensor:
        """A copy of a saved moment of a parameter on a device, where moments lie between steps."""
        return to_host(value, is_pinned=device.type == "cuda") if self.offload else value.to(device, copy=True)


def local(tensor: Any) -> Any:
    """This process's share of a tensor; an ordinary one itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def moment_shapes(parameter: Tensor, *, eight_bit: bool) -> list[tuple[torch.Size, int]]:
    """Shapes and bytes per number of what is kept of a whole parameter, besides its step count: for a plan."""
    block = block_size(parameter.shape) if eight_bit else None
    if block is None:
        return [(parameter.shape, 4)] * 2
    return [(parameter.shape, 1), (torch.Size([parameter.shape[0], parameter.shape[1:].numel() // block]), 4)] * 2
