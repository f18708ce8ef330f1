"""Work that the blocks of a model family can share once their layers are packed, as the family says of its own classes.

    merge    projections of one input become one call, by the switch that an attention of diffusers has for it
    gate     a block whose gates and residuals are computed inside of the packed layers before them, and whose norms'
             modulations inside of those behind

A family's file calls :func:`register_fusion` when it is imported; :mod:`qvgen.deploy.packed_fusion` asks all that are
registered about each module and names no class itself. Results stay the same to the bit whatever is fused, so a family may
leave all of it out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class ProjectionMerge:
    """How an attention is told that several of its projections are one layer.

    Attributes:
        parts: Names of the projections, which read the same input, in the order of the merged outputs.
        into: Name of the attribute from which the attention's processor reads the merged layer.
        processor: The processor that reads it; None: the attention's own does where ``fused_projections`` is set.
    """

    parts: tuple[str, ...]
    into: str
    processor: Any = None


def _nothing(module: nn.Module) -> None:
    del module


@dataclass(frozen=True, kw_only=True)
class BlockFusion:
    """The fusions of one family.

    Attributes:
        merge: Says of any module how its projections are merged; None for one that is no such attention.
        gate: Makes, of a block whose feed-forward runs by blocks of rows already, the block that takes its place: it holds
            the same modules under the same names. None for any other module. An attribute ``fused_norms`` of it, where there
            is one, says whether it hands norms to the layers behind them as well, with other last bits than torch's.
    """

    merge: Callable[[nn.Module], ProjectionMerge | None] = _nothing
    gate: Callable[[nn.Module], nn.Module | None] = _nothing


def gains_by_fusing(x: Tensor) -> bool:
    """Whether operators of x's own type between layers cost a pass over memory that a fused layer saves.

    A CPU's do not: torch's bfloat16 operators are as fast there as the fused ones (docs/log.md).
    """
    return x.device.type != "cpu"


def under_autocast(x: Tensor) -> bool:
    """Whether operators on x's device choose types by themselves, other ones for a norm than for a product."""
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


_loaders: dict[str, Callable[[], BlockFusion]] = {}


def register_fusion(name: str, load: Callable[[], BlockFusion]) -> None:
    """Make a family's fusions known to every packed model that is loaded from now on.

    Args:
        name: Whose they are; a second registration under one name takes the place of the first.
        load: Returns them when a packed model is loaded. So the classes of the transformer are imported no sooner.
    """
    _loaders[name] = load


def registered_fusions() -> tuple[BlockFusion, ...]:
    """The fusions of all families whose files were imported, in the order of their names."""
    return tuple(load() for _, load in sorted(_loaders.items()))
