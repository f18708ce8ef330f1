"""The tiny model at a width where averages over a row mean something: blocks of width 256."""

from __future__ import annotations

import torch

from qvgen.models.tiny_family import TinyFamily


class TinyWideVideoDiT(TinyFamily):
    """4.8 million parameters (conf/model/tiny_wide.yaml); its teacher is stored in bfloat16."""

    name = "tiny_wide"
    teacher_file = "tiny_wide_teacher.safetensors"
    teacher_dtype = torch.bfloat16
