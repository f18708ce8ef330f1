"""The tiny model: three blocks of width 64, which two CPU cores train in half an hour and quantize in a minute."""

from __future__ import annotations

import torch

from qvgen.models.tiny_family import TinyFamily


class TinyVideoDiT(TinyFamily):
    """0.2 million parameters (conf/model/tiny.yaml); its teacher is stored in float32."""

    name = "tiny"
    teacher_file = "tiny_teacher.safetensors"
    teacher_dtype = torch.float32
