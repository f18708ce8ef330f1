"""What a training step asks of a GPU, operator by operator, and how long that would take: a model of it.

Counted on tensors without values (:mod:`qvgen.training.planning.shape_operators`) while the real loss and its backward pass
run. An operator is one kernel, which reads its arguments and writes its results once; views are none. Elementwise work is
most of what fake quantization adds to a step, and no table of operations has it.

The time is a model and no measurement: a product takes its operations at a stated share of the device's peak, or its bytes at
a stated share of the memory's speed, whichever is longer; any other operator its bytes; none less than a kernel's own time.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from qvgen.training.planning.live_bytes import tensors_of
from qvgen.training.planning.operation_counter import flops_of
from qvgen.training.planning.shape_operators import ShapeOperators

_ALLOCATIONS = frozenset(("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::detach"))


@dataclass(frozen=True, kw_only=True)
class ModelledDevice:
    """A device by the numbers of its data sheet, and the shares of them that kernels are assumed to reach.

    Attributes:
        name: In words.
        flops: Operations per second of matrix products, by dtype.
        bytes_per_second: Of its memory.
        product_share: What a matrix product reaches of ``flops``.
        attention_share: What attention's products reach of it.
        memory_share: What other kernels reach of ``bytes_per_second``.
        kernel_seconds: What the smallest kernel takes.
    """

    name: str
    flops: dict[torch.dtype, float]
    bytes_per_second: float
    product_share: float
    attention_share: float
    memory_share: float
    kernel_seconds: float


H200 = ModelledDevice(
    name="H200",
    flops={torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 67e12},
    bytes_per_second=4.8e12,
    product_share=0.7,
    attention_share=0.5,
    memory_share=0.8,
    kernel_seconds=3e-6,
)
"""NVIDIA's data sheet, dense; the shares are assumptions that no run has tested."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Sums over the operators of a micro-batch.

    Attributes:
        kernels: Operators that are no views.
        product_flops: Operations of matrix products and convolutions.
        attention_flops: Of attention's products.
        other_bytes: Read and written by all that is no product.
        product_ps: Modelled time of products, in whole picoseconds, so that equal blocks add equal amounts.
        attention_ps: Of attention.
        other_ps: Of all else.
    """

    kernels: int
    product_flops: int
    attention_flops: int
    other_bytes: int
    product_ps: int
    attention_ps: int
    other_ps: int

    @property
    def seconds(self) -> float:
        """Modelled time of all."""
        return 1e-12 * (self.product_ps + self.attention_ps + self.other_ps)


class TrafficOperators(ShapeOperators):
    """Operators without values that are counted.

    Args:
        device: What the time is modelled for.
        sees_fused: Let layers run their fused operators, as training does where the device has them.
    """

    def __init__(self, device: ModelledDevice, *, sees_fused: bool) -> None:
        super().__init__()
        self.sees_fused = sees_fused
        self._device = device
        self._sums = dict.fromkeys((field.name for field in fields(Traffic)), 0)

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operator without values and add what it asks for."""
        if func.namespace == "qvgen":  # these change an argument and return other tensors
            made = self.made(func, args, kwargs) if func._schema.returns else [None]
            result = made[0] if len(made) == 1 else tuple(made)
        else:
            result = super().__call__(func, args, kwargs)
            if self.kind(func) == "view" or func._schema.name in _ALLOCATIONS:
                return result
        self._add(func, args, kwargs, result)
        return result

    def _add(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        read = list(tensors_of((args, tuple(kwargs.values()))))
        changed = [
            value
            for value, argument in zip(args, func._schema.arguments, strict=False)
            if isinstance(value, Tensor) and argument.alias_info is not None and argument.alias_info.is_write
        ]
        made = [tensor for tensor in tensors_of((result,)) if not any(tensor is value for value in changed)]
        moved = sum(_nbytes(tensor) for tensor in (*read, *changed, *made))
        flops = flops_of(func, args, kwargs, result)
        kind = "other" if flops is None else "attention" if "scaled_dot_product" in func._schema.name else "product"
        share = self._device.attention_share if kind == "attention" else self._device.product_share
        memory = moved / (self._device.memory_share * self._device.bytes_per_second)
        product = 0.0
        if flops is not None:
            dtype = next(tensor.dtype for tensor in read if tensor.is_floating_point())
            product = flops / (share * self._device.flops[dtype])
            self._sums[f"{kind}_flops"] += flops
        else:
            self._sums["other_bytes"] += moved
        self._sums["kernels"] += 1
        self._sums[f"{kind}_ps"] += round(1e12 * max(memory, product, self._device.kernel_seconds))

    def traffic(self) -> Traffic:
        """What was counted until now."""
        return Traffic(**self._sums)


def _nbytes(tensor: Tensor) -> int:
    """What reading or writing a tensor moves: an expanded one lies in memory once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
