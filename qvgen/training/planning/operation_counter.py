"""Counts operations and live bytes of a training step while it runs, on tensors with values or without.

Operations are those of products: 2 M N K for a matrix product, by torch's own table (torch.utils.flop_counter), and
attention's, two products forward and five backward, which compute the scores again. Elementwise work, which is most of
what quantizing costs, is in no such table.

FlopCounterMode itself is not used: its hooks on modules keep the recomputed tensors of checkpointed blocks alive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from qvgen.training.blocks.checkpointing import CheckpointBlock
from qvgen.training.planning.live_bytes import LiveBytes
from qvgen.training.planning.shape_operators import ShapeOperators

_ATEN = torch.ops.aten
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # torch's table lacks the CPU's attention; the formulas are those of CUDA's, of the leading arguments
    _ATEN._scaled_dot_product_flash_attention_for_cpu: lambda *args, **_: sdpa_flop_count(*_shapes(args[:3])),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda *args, **_: sdpa_backward_flop_count(
        *_shapes(args[:4])
    ),
}
_FLOPS |= {  # of attention in 8 bits the products are as many
    getattr(torch.ops.qvgen, name): formula
    for name, formula in (
        ("attention", lambda *args, **_: sdpa_flop_count(*_shapes(args[:3]))),
        ("attention_backward", lambda *args, **_: sdpa_backward_flop_count(*_shapes(args[:4]))),
    )
}
_CUDA_FLOAT32 = frozenset(
    ("layer_norm", "group_norm", "rms_norm", "pow", "__pow__", "rsqrt", "reciprocal", "exp", "log", "softplus", "norm")
)
"""Operators of diffusers' transformers and our layers that CUDA's autocast runs in float32 and the CPU's does not."""


@dataclass(frozen=True, kw_only=True)
class StepCount:
    """One micro-batch. Bytes are besides weights, buffers, gradients and moments.

    Attributes:
        kept_bytes: Alive between forward and backward pass: what was saved for the backward pass.
        peak_bytes: The largest sum that is alive at once, anywhere.
        teacher_flops: Operations of the teacher's forward pass.
        student_flops: Of the student's.
        recompute_flops: Of what gradient checkpointing runs again.
        backward_flops: Of the rest of the backward pass.
        attention_flops: Of attention's products in all of them.
        forward_attention_flops: Of attention's products in the student's forward pass.
    """

    kept_bytes: int
    peak_bytes: int
    teacher_flops: int
    student_flops: int
    recompute_flops: int
    backward_flops: int
    attention_flops: int
    forward_attention_flops: int

    @property
    def flops(self) -> int:
        """All of them."""
        return self.teacher_flops + self.student_flops + self.recompute_flops + self.backward_flops


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int | None:
    """Operations of an operator's products; None where it has none."""
    formula = _FLOPS.get(func._overloadpacket)
    return None if formula is None else formula(*args, **kwargs, out_val=result)


class OperationCounter(LiveBytes):
    """Operations by phase, and the bytes beside them; active while ``with counter``.

    Args:
        known: Tensors that are no activations: weights, gradients, buffers, the batch.
        autocast: The forward pass runs under bfloat16 autocast.
        operators: What runs operators in place of themselves; None: they compute.

    Attributes:
        sees_fused: Layers run their fused operators under it, which count as one each; else torch's own.
        phase: teacher, student, recompute or backward.
        flops: Operations of each phase.
        attention_flops: Of attention's products in each.
    """

    def __init__(
        self, known: Sequence[Tensor] = (), *, autocast: bool = False, operators: ShapeOperators | None = None
    ) -> None:
        super().__init__(known)
        self.autocast, self._operators = autocast, operators
        self.sees_fused = operators is not None and operators.sees_fused
        self.phase = "student"
        self.flops = dict.fromkeys(("teacher", "student", "recompute", "backward"), 0)
        self.attention_flops = dict(self.flops)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operator, then add its operations if it is a product."""
        result = func(*args, **kwargs) if self._operators is None else self._operators(func, args, kwargs)
        if (flops := flops_of(func, args, kwargs, result)) is not None:
            self.flops[self.phase] += flops
            self.attention_flops[self.phase] += flops if _is_attention(func._schema.name) else 0
        return result

    def enter(self, phase: str) -> None:
        """Name what follows."""
        self.phase = phase

    def counted(self, how: CheckpointBlock) -> CheckpointBlock:
        """Wrap a function that runs blocks so that the recomputation of a block is counted apart from its first run."""

        def run(function: Callable[..., Any], *args: Any) -> Any:
            def named(*inputs: Any) -> Any:
                phase = self.phase
                self.enter("recompute" if phase == "backward" else phase)
                try:
                    with self.casts():  # torch leaves function modes out of backward()
                        return function(*inputs)
                finally:  # torch ends a recomputation by an exception when it has all it needs
                    self.enter(phase)

            return how(named, *args)

        return run

    def casts(self) -> AbstractContextManager[Any]:
        """What makes CPU tensors be cast as on a GPU, beside CPU autocast."""
        return _CudaAutocast() if self.autocast else nullcontext()

    def result(self, *, kept_bytes: int) -> StepCount:
        """What was counted."""
        return StepCount(
            kept_bytes=kept_bytes,
            peak_bytes=self.peak,
            attention_flops=sum(self.attention_flops.values()),
            forward_attention_flops=self.attention_flops["student"],
            **{f"{phase}_flops": flops for phase, flops in self.flops.items()},
        )


class _CudaAutocast(TorchFunctionMode):
    """Makes CPU autocast cast to float32 where CUDA's does (ATen/autocast_mode.h)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Cast the arguments of listed operators."""
        del types
        if getattr(func, "__name__", "") in _CUDA_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = tuple(_float32(argument) for argument in args)
            kwargs = {key: _float32(value) for key, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value


def _is_attention(operator: str) -> bool:
    """Whether an operator of this name makes attention's products, in floating point or in 8 bits."""
    return "scaled_dot_product" in operator or operator.startswith("qvgen::attention")


def _shapes(tensors: Sequence[Tensor]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]
