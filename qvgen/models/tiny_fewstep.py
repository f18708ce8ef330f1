"""The tiny model as a student of four steps, distilled from it with its guidance (docs/small_model.md)."""

from __future__ import annotations

import torch

from qvgen.models.tiny_family import TinyFamily


class TinyFewStepVideoDiT(TinyFamily):
    """The tiny model's sizes and four timesteps (conf/model/tiny_fewstep.yaml); its teacher is stored in float32."""

    name = "tiny_fewstep"
    teacher_file = "tiny_fewstep_teacher.safetensors"
    teacher_dtype = torch.float32
