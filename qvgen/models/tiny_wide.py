"""The tiny family at a width where averages over a row mean something: blocks of width 256, everything else as in tiny."""

from __future__ import annotations

import torch

from qvgen.models.tiny import TinyVideoDiT


class TinyWideVideoDiT(TinyVideoDiT):
    """The same model with more channels and blocks (conf/model/tiny_wide.yaml); its teacher is stored in bfloat16."""

    name = "tiny_wide"
    teacher_file = "tiny_wide_teacher.safetensors"
    teacher_dtype = torch.bfloat16
