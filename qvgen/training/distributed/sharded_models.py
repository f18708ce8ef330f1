"""Student and teacher of a run with strategy=fsdp: whole on the host of rank 0, shares of them on every device.

    before training   rank 0 prepares the student and loads the teacher; the others build both on the meta device
    configure_model   each tensor goes from rank 0 to the shares; then rank 0's student gives its memory back
    after training    rank 0's student is put together again, on its host

No process but rank 0 ever holds a weight that is not its own share.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from qvgen.config.schema import TrainConfig
from qvgen.training.distributed.sharding import gather_, share_out_
from qvgen.training.meta_model import build_student, build_teacher


def uses_teacher(config: TrainConfig) -> bool:
    """Whether the teacher takes part in training: as the target, or beside the student in validation videos."""
    videos = config.evaluation.video_every_steps is not None
    return bool(config.method.quantizes and (config.method.needs_teacher or videos))


class ShardedModels:
    """What a process contributes to a sharded run, and its shares.

    Args:
        config: The run's.
        whole_student: On rank 0, prepared, with the weights that training starts from; None elsewhere.
        whole_teacher: On rank 0, where :func:`uses_teacher`; stays as it is. None elsewhere.

    Attributes:
        student: On the meta device until :meth:`share_out_`.
        teacher: The same; None if the run has no use for it.
    """

    def __init__(
        self, config: TrainConfig, *, whole_student: nn.Module | None, whole_teacher: nn.Module | None
    ) -> None:
        self._whole_student, self._whole_teacher = whole_student, whole_teacher
        self.student, _ = build_student(config, config.model)
        self.teacher = build_teacher(config.model, dtype=torch.float32) if uses_teacher(config) else None

    def share_out_(self, mesh: DeviceMesh, device: torch.device) -> None:
        """Give every process its shares, on its device; a collective."""
        share_out_(self.student, source=self._whole_student, mesh=mesh, device=device)
        if self._whole_student is not None:
            self._whole_student.to("meta")
        if self.teacher is not None:
            share_out_(self.teacher, source=self._whole_teacher, mesh=mesh, device=device)

    def gather_(self) -> None:
        """Give rank 0's student the trained weights; a collective."""
        gather_(self.student, target=self._whole_student)
