"""Types and places of what a run stores from step to step, and the bytes of each kind.

masters     4 or 2 bytes per weight of a quantized layer, 4 for all else     the device's, a share with strategy=fsdp
gradients   4 or 2 bytes, the same way                                       the device's, a share
moments     8 bytes, or 2 and two scales per block of up to 256 (weights)    the device's or the host's, a share
average     4 bytes, where there is one                                      the device's or the host's, a share
teacher     in its dtype, where the method has one                           the device's, or three blocks of it; a share

With ``strategy.cpu_offload`` the shares of all of them lie on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qvgen.training.blocks.teacher_offload import BLOCKS_ON_DEVICE
from qvgen.training.design.training_run import TrainingRun
from qvgen.training.distributed.gathering import Gathering
from qvgen.training.distributed.sharding import blocks_of, rows_of
from qvgen.training.optim.master_precision import trained_weights
from qvgen.training.optim.streamed_adamw import EIGHT_BIT_GROUP, moment_shapes
from qvgen.training.planning.live_bytes import tensor_bytes


@dataclass(frozen=True, kw_only=True)
class StoredState:
    """What the options that save memory make of a run's state; as it is without them by default.

    Attributes:
        masters: Type of trained weights of quantized layers.
        gradients: Type of their gradients.
        eight_bit: Names of parameters whose moments may have 8 bits.
        moments_on_host: Whether moments lie on the host.
        teacher_on_host: Whether the teacher's blocks do.
        has_average: Whether an average is kept.
        average_on_host: Whether it lies on the host.
        gathering: How shared models are gathered, and whether their shares lie on the host.
    """

    masters: str = "float32"
    gradients: str = "float32"
    eight_bit: frozenset[str] = field(default_factory=frozenset)
    moments_on_host: bool = False
    teacher_on_host: bool = False
    has_average: bool = False
    average_on_host: bool = False
    gathering: Gathering = field(default_factory=Gathering)

    @classmethod
    def of(cls, run: TrainingRun, student: nn.Module) -> StoredState:
        """A run's, whose student is on the meta device."""
        optim, eight_bit = run.steps.optim, frozenset[str]()
        if optim.name == "adamw_8bit":
            groups = run.design.method.parameter_groups(student, optim)
            chosen = {id(p) for group in groups if group["name"] == EIGHT_BIT_GROUP for p in group["params"]}
            eight_bit = frozenset(name for name, parameter in student.named_parameters() if id(parameter) in chosen)
        return cls(
            masters=optim.masters,
            gradients=optim.gradients,
            eight_bit=eight_bit,
            moments_on_host=optim.offload or run.strategy.cpu_offload,
            teacher_on_host=run.strategy.teacher_offload,
            has_average=run.ema.decay is not None,
            average_on_host=run.ema.host or run.strategy.cpu_offload,
            gathering=Gathering.of(run.strategy),
        )

    def master_bytes(self, student: nn.Module, *, shards: int = 1) -> int:
        """Of all of the student's parameters."""
        return self._bytes(student, student.parameters(), self.masters, shards=shards)

    def gradient_bytes(self, student: nn.Module, *, shards: int = 1) -> int:
        """Of the trained parameters' gradients."""
        return self._bytes(student, trained(student), self.gradients, shards=shards)

    def _bytes(self, student: nn.Module, parameters: Iterable[nn.Parameter], dtype: str, *, shards: int) -> int:
        chosen, size = {id(weight) for weight in trained_weights(student)}, getattr(torch, dtype).itemsize
        return sized_bytes(parameters, lambda p: size if id(p) in chosen else p.element_size(), shards=shards)

    def moment_bytes(self, student: nn.Module, *, shards: int = 1) -> int:
        """Of the optimizer's state: moments, scales, and the step count of each tensor."""
        found = 0
        for name, parameter in student.named_parameters():
            if parameter.requires_grad:
                shapes = moment_shapes(parameter, eight_bit=name in self.eight_bit)
                found += 4 + sum(share_numel(shape, shards=shards) * size for shape, size in shapes)
        return found

    def average_bytes(self, student: nn.Module, *, shards: int = 1) -> int:
        """Of the average, 0 without one."""
        return sized_bytes(trained(student), lambda _: 4, shards=shards) if self.has_average else 0

    def teacher_bytes(self, teacher: nn.Module, *, shards: int = 1) -> int:
        """Of the teacher on each device."""
        buffers = tensor_bytes(teacher.buffers())
        if not self.teacher_on_host:
            return sized_bytes(teacher.parameters(), lambda p: p.element_size(), shards=shards) + buffers
        blocks = [tensor_bytes(block.parameters()) for block in blocks_of(teacher)]
        outside = tensor_bytes(teacher.parameters()) - sum(blocks)
        return outside + buffers + min(BLOCKS_ON_DEVICE, len(blocks)) * max(blocks, default=0)

    @property
    def moments_name(self) -> str:
        """Moments in words."""
        return "8 bits" if self.eight_bit else "float32"

    def host_parts(self, student: nn.Module, *, teacher: nn.Module | None) -> dict[str, int]:
        """What a whole student keeps on the host while it trains, in bytes."""
        parts = {}
        if self.gathering.on_host:
            parts[f"{self.masters} masters"] = self.master_bytes(student)
            parts[f"gradients, {self.gradients}"] = self.gradient_bytes(student)
            if teacher is not None:
                parts["the teacher's weights"] = tensor_bytes(teacher.parameters())
        if self.moments_on_host:
            parts[f"moments, {self.moments_name}"] = self.moment_bytes(student)
        if self.has_average and self.average_on_host:
            parts["average"] = self.average_bytes(student)
        if self.teacher_on_host and teacher is not None:
            blocks = [parameter for block in blocks_of(teacher) for parameter in block.parameters()]
            parts["the teacher's blocks"] = tensor_bytes(blocks)
        return parts


def trained(student: nn.Module) -> list[nn.Parameter]:
    """Parameters that are trained."""
    return [parameter for parameter in student.parameters() if parameter.requires_grad]


def share_numel(shape: torch.Size, *, shards: int) -> int:
    """Numbers of the largest share of a tensor that is cut along its rows."""
    if shards == 1 or not shape:
        return shape.numel()
    rows = rows_of(shape[0], rank=0, world_size=shards)
    return (rows.stop - rows.start) * math.prod(shape[1:])


def sized_bytes(tensors: Iterable[Tensor], size: Callable[[Tensor], int], *, shards: int) -> int:
    """Bytes of the largest share of tensors, of each as many as ``size`` says per number."""
    return sum(share_numel(tensor.shape, shards=shards) * size(tensor) for tensor in tensors)
