"""A packed transformer's blocks with fewer passes over memory, and the same bits.

    attention      q, k and v of one input are one call (:mod:`qvgen.deploy.merged_linear`), by the switch that diffusers'
                   attention has for fused projections; where their tables or smoothing differ, as after a method that smooths
                   each layer by itself, or training with method.share_activations=false, they stay three
    feed-forward   by blocks of rows (:mod:`qvgen.deploy.blocked_feed_forward`)
    Wan's block    gates and residuals are part of the layers before them (:mod:`qvgen.deploy.gated_wan_block`)

No tensor is added to a checkpoint: the layers that a state dict names are still there.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import nn

from qvgen.deploy.blocked_feed_forward import BlockedFeedForward
from qvgen.deploy.gated_wan_block import GatedWanBlock, can_gate
from qvgen.deploy.merged_linear import MergedPackedLinear, can_merge
from qvgen.layers.packed_linear import PackedLinear


@dataclass(frozen=True, kw_only=True)
class FusionCount:
    """How much of a transformer was fused.

    Attributes:
        merged: Packed layers that are part of a merged one.
        feed_forwards: Feed-forwards that run by blocks of rows.
        gated: Blocks whose gates and residuals are part of their layers.
    """

    merged: int
    feed_forwards: int
    gated: int


def fuse_packed_(model: nn.Module) -> FusionCount:
    """Let the blocks of a packed transformer share what they can; in place, outputs stay the same to the bit."""
    merged = 0
    for module in list(model.modules()):
        if isinstance(module, WanAttention):
            merged += _merge_wan_(module)
        elif isinstance(module, Attention) and isinstance(module.processor, CogVideoXAttnProcessor2_0):
            merged += _merge_cogvideox_(module)
    feed_forwards = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, FeedForward) and any(isinstance(part, PackedLinear) for part in module.modules())
    ]
    for name, module in feed_forwards:
        model.set_submodule(name, BlockedFeedForward(module))
    gated = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, WanTransformerBlock) and can_gate(module)
    ]
    for name, module in gated:
        model.set_submodule(name, GatedWanBlock(module))
    return FusionCount(merged=merged, feed_forwards=len(feed_forwards), gated=len(gated))


def prepack_(model: nn.Module) -> set[str]:
    """Derive the backends' copies of all weights, of merged layers once; the names of the backends."""
    merged = [module for module in model.modules() if isinstance(module, MergedPackedLinear)]
    parts = {id(part) for module in merged for part in module.parts}
    alone = [module for module in model.modules() if isinstance(module, PackedLinear) and id(module) not in parts]
    return {module.prepack_() for module in [*merged, *alone]}


def kernel_names(model: nn.Module) -> tuple[str, ...]:
    """Backends that have run a model's packed layers since it lies where it lies; empty where it has none."""
    packed = (module for module in model.modules() if isinstance(module, MergedPackedLinear | PackedLinear))
    return tuple(sorted(set().union(*(module.kernels for module in packed))))


def _packed(module: nn.Module, *names: str) -> list[PackedLinear] | None:
    parts = [getattr(module, name) for name in names]
    packed = [part for part in parts if isinstance(part, PackedLinear)]
    return packed if len(packed) == len(parts) and can_merge(packed) else None


def _merge_wan_(attention: WanAttention) -> int:
    """Give a WanAttention one layer for q, k and v, or for k and v where it attends to the text."""
    if attention.add_k_proj is not None:  # an image condition, whose k and v would have to be merged too
        return 0
    crossed = attention.is_cross_attention
    parts = _packed(attention, *(("to_k", "to_v") if crossed else ("to_q", "to_k", "to_v")))
    if parts is None or len({part.out_features for part in parts}) > 1:
        return 0
    setattr(attention, "to_kv" if crossed else "to_qkv", MergedPackedLinear(parts))
    attention.fused_projections = True
    return len(parts)


def _merge_cogvideox_(attention: Attention) -> int:
    """Give CogVideoX's attention one layer for q, k and v."""
    parts = _packed(attention, "to_q", "to_k", "to_v")
    if parts is None or len({part.out_features for part in parts}) > 1:
        return 0
    attention.to_qkv = MergedPackedLinear(parts)
    attention.fused_projections = True
    attention.set_processor(FusedCogVideoXAttnProcessor2_0())
    return len(parts)
