"""Student and teacher of a run with strategy=fsdp: whole on the host of rank 0, shares of them on every device.

    before training   rank 0 prepares the student and loads the teacher; the others build both on the meta device
    configure_model   rank 0's student gives its memory back, every rank reads its rows of the start's file; the teacher's
                      tensors go from rank 0 to the shares
    after training    rank 0's student is put together again, on its host

No process but rank 0 ever holds a weight that is not its own share; with ``strategy.low_host_memory`` not even rank 0 does,
and nothing is put together again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh

from qvgen.methods.base import Method
from qvgen.models.base import VideoDiT
from qvgen.models.tensor_reader import tensor_reader_of
from qvgen.training.design.meta_model import build_student, build_teacher
from qvgen.training.design.student import StudentDesign
from qvgen.training.distributed.file_shares import computed_buffers, share_student_, share_teacher_
from qvgen.training.distributed.gathering import Gathering
from qvgen.training.distributed.sharding import gather_, share_out_


def uses_teacher(method: Method, *, shows_videos: bool) -> bool:
    """Whether the teacher takes part in training: as the target, or beside the student in validation videos."""
    return method.quantizes and (method.needs_teacher or shows_videos)


@dataclass(frozen=True, kw_only=True, eq=False)
class WholeModels:
    """The models that a process holds whole: rank 0's, none on the others.

    Attributes:
        student: Prepared, with the weights that training starts from.
        teacher: Where it takes part; it stays as it is.
    """

    student: nn.Module | None
    teacher: nn.Module | None


class ShardedModels:
    """What a process contributes to a sharded run, and its shares.

    Args:
        family: The model family.
        design: The student's layers.
        has_teacher: Whether the teacher takes part, see :func:`uses_teacher`.
        whole: What this process holds whole; None: no process has a whole model, rank 0 neither, and all read their rows from
            the start's file and the model's.
        start: The file of the student's tensors (:mod:`qvgen.training.start.file`). It may be deleted once a checkpoint
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
        whole: WholeModels | None,
        start: Path,
        how: Gathering | None = None,
    ) -> None:
        self._family, self._whole = family, whole
        self._start, self._how = start, how or Gathering()
        self.student, _ = build_student(family, design)
        dtype = getattr(torch, getattr(family, "dtype", "float32")) if whole is None else torch.float32
        self.teacher = build_teacher(family, dtype=dtype) if has_teacher else None

    def share_out_(self, mesh: DeviceMesh, device: torch.device) -> None:
        """Give every process its shares, on its device or its host; a collective."""
        if (whole_models := self._whole) is None:
            self._read_(mesh, device)
            return
        found, how = [self._start.is_file()], self._how
        distributed.broadcast_object_list(found, src=0)
        file = self._start if found[0] else None
        share_out_(self.student, source=whole_models.student, mesh=mesh, device=device, file=file, how=how)
        if whole_models.student is not None:
            whole_models.student.to("meta")
        if self.teacher is not None:
            share_out_(self.teacher, source=whole_models.teacher, mesh=mesh, device=device, how=how.without_backward)

    def _read_(self, mesh: DeviceMesh, device: torch.device) -> None:
        """Read this process's shares; no process has more to give."""
        given = {"computed": computed_buffers(self._family), "mesh": mesh, "device": device}
        share_student_(self.student, start=self._start, **given, how=self._how)
        if self.teacher is not None:
            read = tensor_reader_of(self._family)
            assert read is not None, "it was asked before"
            share_teacher_(self.teacher, read=read, **given, how=self._how.without_backward)

    def gather_(self) -> None:
        """Give rank 0's student the trained weights; a collective, and nothing where no process has a whole student."""
        if self._whole is not None:
            gather_(self.student, target=self._whole.student)
