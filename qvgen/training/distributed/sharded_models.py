"""Student and teacher of a run with strategy=fsdp: whole on the host of rank 0, shares of them on every device.

    before training   rank 0 prepares the student and loads the teacher; the others build both on the meta device
    configure_model   rank 0's student gives its memory back, every rank reads its rows of the start's file; the teacher's
                      tensors go from rank 0 to the shares
    after training    rank 0's student is put together again, on its host

No process but rank 0 ever holds a weight that is not its own share.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh

from qvgen.methods.base import Method
from qvgen.models.base import VideoDiT
from qvgen.training.distributed.gathering import Gathering
from qvgen.training.distributed.sharding import gather_, share_out_
from qvgen.training.meta_model import build_student, build_teacher
from qvgen.training.student_design import StudentDesign


def uses_teacher(method: Method, *, shows_videos: bool) -> bool:
    """Whether the teacher takes part in training: as the target, or beside the student in validation videos."""
    return method.quantizes and (method.needs_teacher or shows_videos)


class ShardedModels:
    """What a process contributes to a sharded run, and its shares.

    Args:
        family: The model family.
        design: The student's layers.
        has_teacher: Whether the teacher takes part, see :func:`uses_teacher`.
        whole_student: On rank 0, prepared, with the weights that training starts from; None elsewhere.
        whole_teacher: On rank 0, where the teacher takes part; stays as it is. None elsewhere.
        start: The file of the student's tensors (:mod:`qvgen.training.start_file`). It may be deleted once a checkpoint
            stands in for it: where rank 0 does not find it, it sends what it has.
        how: How blocks are gathered, and where shares lie; None: gathered when they are entered, on the devices.

    Attributes:
        student: On the meta device until :meth:`share_out_`.
        teacher: The same; None if the run has no use for it.
    """

    def __init__(
        self,
        family: VideoDiT,
        design: StudentDesign,
        *,
        has_teacher: bool,
        whole_student: nn.Module | None,
        whole_teacher: nn.Module | None,
        start: Path,
        how: Gathering | None = None,
    ) -> None:
        self._start, self._how = start, how or Gathering()
        self._whole_student, self._whole_teacher = whole_student, whole_teacher
        self.student, _ = build_student(family, design)
        self.teacher = build_teacher(family, dtype=torch.float32) if has_teacher else None

    def share_out_(self, mesh: DeviceMesh, device: torch.device) -> None:
        """Give every process its shares, on its device or its host; a collective."""
        found, how = [self._start.is_file()], self._how
        distributed.broadcast_object_list(found, src=0)
        file = self._start if found[0] else None
        share_out_(self.student, source=self._whole_student, mesh=mesh, device=device, file=file, how=how)
        if self._whole_student is not None:
            self._whole_student.to("meta")
        if self.teacher is not None:
            share_out_(self.teacher, source=self._whole_teacher, mesh=mesh, device=device, how=how.without_backward)

    def gather_(self) -> None:
        """Give rank 0's student the trained weights; a collective."""
        gather_(self.student, target=self._whole_student)
