"""The packed blocks of CogVideoX: q, k and v, which read the same input, are one call.

Its gates are in bfloat16 and cost torch as little as they would cost the kernel (docs/log.md), so they stay where they are.
"""

from __future__ import annotations

from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0
from torch import nn

from qvgen.layers.block_fusion import BlockFusion, ProjectionMerge


def merge_projections(module: nn.Module) -> ProjectionMerge | None:
    """The merge of an attention that has the processor of CogVideoX; None of any other module."""
    if not isinstance(module, Attention) or not isinstance(module.processor, CogVideoXAttnProcessor2_0):
        return None
    return ProjectionMerge(parts=("to_q", "to_k", "to_v"), into="to_qkv", processor=FusedCogVideoXAttnProcessor2_0())


COGVIDEOX_FUSION = BlockFusion(merge=merge_projections)
"""See :mod:`qvgen.layers.block_fusion`."""
