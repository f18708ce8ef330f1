"""A packed transformer's blocks with fewer passes over memory, and the same bits.

    attention      q, k and v of one input are one call (:mod:`qvgen.deploy.merged_linear`), by the switch that diffusers'
                   attention has for fused projections; where their tables or smoothing differ, as after a method that smooths
                   each layer by itself, or training with method.share_activations=false, they stay three
    feed-forward   by blocks of rows, GELU as part of its last layer (:mod:`qvgen.layers.blocked_feed_forward`)
    gates          and residuals are part of the layers before them, modulations of those behind

Which attentions and which blocks, the model families say (:mod:`qvgen.layers.block_fusion`): the installed ones, whose files
are imported here, and those that a command brought. No tensor is added to a checkpoint: the layers that a state dict names
are still there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch import nn

from qvgen.config.leaf_file import group_targets
from qvgen.deploy.merged_linear import MergedPackedLinear, can_merge
from qvgen.errors import OWN_PACKAGES, UserError, one_line
from qvgen.layers.block_fusion import ProjectionMerge, registered_fusions
from qvgen.layers.blocked_feed_forward import BlockedFeedForward
from qvgen.layers.packed_linear import PackedLinear

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FusionCount:
    """How much of a transformer was fused.

    Attributes:
        merged: Packed layers that are part of a merged one.
        feed_forwards: Feed-forwards that run by blocks of rows.
        gated: Blocks that hand modulations, gates and residuals to their layers wherever that gains something.
    """

    merged: int
    feed_forwards: int
    gated: int


def fuse_packed_(model: nn.Module, *, fused_norms: bool = False) -> FusionCount:
    """Let the blocks of a packed transformer share what they can; in place, outputs stay the same to the bit.

    Args:
        model: A packed transformer.
        fused_norms: Norms become part of the layers behind them too. Their last bits are then others than torch's.

    Raises:
        ValueError: ``fused_norms`` for a model none of whose blocks can do that.
    """
    _import_families()
    fusions = registered_fusions()
    merged = 0
    for module in list(model.modules()):
        merge = next((merge for fusion in fusions if (merge := fusion.merge(module)) is not None), None)
        if merge is not None:
            merged += _merge_(module, merge)
    feed_forwards = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, FeedForward) and any(isinstance(part, PackedLinear) for part in module.modules())
    ]
    for name, module in feed_forwards:
        model.set_submodule(name, BlockedFeedForward(module, function=_function(module)))
    gated = [
        (name, block)
        for name, module in list(model.named_modules())
        for fusion in fusions
        if (block := fusion.gate(module)) is not None
    ]
    if fused_norms and not any(hasattr(block, "fused_norms") for _, block in gated):
        raise UserError(
            f"fused_norms=true: no block of {type(model).__name__} takes its norms into packed layers; leave fused_norms out"
        )
    for name, block in gated:
        if hasattr(block, "fused_norms"):
            block.fused_norms = fused_norms
        model.set_submodule(name, block)
    return FusionCount(merged=merged, feed_forwards=len(feed_forwards), gated=len(gated))


def _function(feed_forward: FeedForward) -> str:
    """The function between a feed-forward's two layers that the last one can compute; "none" where it is built otherwise."""
    layers = [
        module
        for module in feed_forward.net
        if not (isinstance(module, nn.Dropout) and (module.p == 0 or not module.training))
    ]
    first, last = layers[0], layers[-1]
    packed = type(first) is GELU and isinstance(first.proj, PackedLinear) and isinstance(last, PackedLinear)
    return "gelu_tanh" if packed and len(layers) == 2 and first.approximate == "tanh" else "none"


def _import_families() -> None:
    """Import the files of all installed families, which register what their blocks share."""
    for target in group_targets("model"):
        module = target.rpartition(".")[0]
        try:
            import_module(module)
        except Exception as error:  # a plug-in's code may raise anything, and this model may not need it
            if module.partition(".")[0] in OWN_PACKAGES:
                raise
            log.warning("%s can't be imported, so its blocks share nothing: %s", module, one_line(error))


def prepack_(model: nn.Module) -> set[str]:
    """Derive the backends' copies of all weights, of merged layers once; the names of the backends.

    Where one of them can't be made, as memory runs out, every layer keeps what it had before.
    """
    return prepack_layers_(prepacked_layers(model))


def prepacked_layers(model: nn.Module) -> list[MergedPackedLinear | PackedLinear]:
    """The modules that backends' copies belong to: merged layers, and packed ones that are no part of one."""
    merged = [module for module in model.modules() if isinstance(module, MergedPackedLinear)]
    parts = {id(part) for module in merged for part in module.parts}
    alone = [module for module in model.modules() if isinstance(module, PackedLinear) and id(module) not in parts]
    return [*merged, *alone]


def prepack_layers_(modules: Iterable[MergedPackedLinear | PackedLinear]) -> set[str]:
    """Do what :func:`prepack_` does for some of a model's modules."""
    earlier = [(module, copy(module._prepacked)) for module in modules]
    try:
        return {module.prepack_() for module, _ in earlier}
    except BaseException:
        for module, prepacked in earlier:
            module._prepacked = prepacked
        raise


def kernel_names(model: nn.Module) -> tuple[str, ...]:
    """Backends that have run a model's packed layers since it lies where it lies; empty where it has none."""
    packed = (module for module in model.modules() if isinstance(module, MergedPackedLinear | PackedLinear))
    return tuple(sorted(set().union(*(module.kernels for module in packed))))


def _merge_(attention: Any, merge: ProjectionMerge) -> int:
    """Give an attention one layer for several projections; how many they are, 0 where they have to stay apart."""
    parts = [getattr(attention, name) for name in merge.parts]
    packed = [part for part in parts if isinstance(part, PackedLinear)]
    if len(packed) != len(parts) or not can_merge(packed) or len({part.out_features for part in packed}) > 1:
        return 0
    setattr(attention, merge.into, MergedPackedLinear(packed))
    attention.fused_projections = True
    if merge.processor is not None:
        attention.set_processor(merge.processor)
    return len(packed)
