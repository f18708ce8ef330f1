"""SVDQuant (arXiv 2411.05007): smooth, move the weight's largest singular directions into a branch, round what is left.

    W' = W / m                 m as SmoothQuant's (Eq. 4 to 6 of the paper: outliers of X go into W)
    W' = L R + W''             L R the best approximation of rank r, a branch in 16 bits on the unquantized input
    y  = x (R m)^T L^T + Q(x m) Q(W'')^T

The branch acts on x as it comes, as the runtimes have it: m (and a rotation, if the profile has one) is folded into R. Its
factors are rounded to bfloat16 first and W'' is what they leave of W', so their rounding is no error. W'' is the master
weight of the layer; the branch stays through training and is part of the packed checkpoint, unlike Phi.

Left out: the paper's GPTQ rounding of W'' (``init=gptq`` has it, without a branch) and its fused kernels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from qvgen.config.schema.value_range import Range, check_ranges
from qvgen.initializers.base import LayerStatistics, Need, require
from qvgen.initializers.smoothing import chosen_scale
from qvgen.layers.branch import BRANCH_DTYPE
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.fake_quant_product import rotated
from qvgen.lowrank.svd import truncated_svd
from qvgen.quant.bgr import refine_grid
from qvgen.quant.runtime import Addition
from qvgen.quant.smoothing import ALPHA


@dataclass(frozen=True, kw_only=True)
class SvdQuant:
    """Smoothing, a low-rank branch, and refined grids for what is left.

    Attributes:
        alpha: Share of the input's range that moves into the weight; None: for every layer the value with the least
            error of its output on a sample of its inputs is searched, no smoothing among the candidates.
        rank: Rank of the 16-bit branch; a weight with fewer rows or columns has a branch of its own rank. The runtimes
            want multiples of 16.
        seed: Seed of the randomized decomposition.
        fold_smoothing: True folds the smoothing vector m into what stands before a layer (norms, modulations, values)
            where the model allows it; False multiplies by it everywhere.
        compared_rotations: `qvgen benchmark` also measures it with layers that are rotated by so many columns.
    """

    alpha: Annotated[float | None, ALPHA]
    rank: Annotated[int, Range("> 0", write="32")]
    seed: int
    fold_smoothing: bool

    compared_rotations: ClassVar[tuple[int, ...]] = (16,)
    concurrent: ClassVar[bool] = True
    additions: ClassVar[frozenset[Addition]] = frozenset({"branch", "smoothing"})

    def __post_init__(self) -> None:
        check_ranges(self, section="init")

    @property
    def needs(self) -> frozenset[Need]:
        """The maxima of the channels, and a sample of inputs where ``alpha`` is searched."""
        return frozenset({"abs_max"}) if self.alpha is not None else frozenset({"abs_max", "inputs"})

    def input_scale(self, layers: Sequence[FakeQuantLinear], *, statistics: LayerStatistics) -> Tensor:
        """See :class:`qvgen.initializers.base.Smoothing`: w_j and the error of the search are those of all layers' rows."""
        return chosen_scale(layers, statistics=statistics, alpha=self.alpha)

    @torch.no_grad()
    def initialize_(self, layer: FakeQuantLinear, *, statistics: LayerStatistics | None) -> Tensor:
        """See :class:`qvgen.initializers.base.Initializer`."""
        statistics = require(statistics, "abs_max")
        if not statistics.smoothed:
            layer.move_(profile=layer.profile, input_scale=self.input_scale([layer], statistics=statistics))
        self._split_(layer)
        refined = refine_grid(layer.weight.detach(), grid=layer.profile.weight)
        layer.weight_quantizer.start_from_(refined.scale, refined.zero_point)
        return layer.weight.detach()

    def _split_(self, layer: FakeQuantLinear) -> None:
        """Move the largest directions of the master weight into the branch."""
        factor = layer.input_scale
        factor = layer.weight.new_ones(layer.in_features) if factor is None else factor
        rank = min(self.rank, *layer.weight.shape)
        left, right = truncated_svd(layer.weight.detach(), rank=rank, generator=_generator(layer, seed=self.seed))
        down = rotated(right, layer.profile) * factor
        down, up = (value.to(BRANCH_DTYPE).float() for value in (down, left))
        inside = rotated(down / factor, layer.profile)
        layer.weight.sub_(up @ inside)
        layer.set_branch_(down, up)


def _generator(layer: FakeQuantLinear, *, seed: int) -> torch.Generator:
    """A generator that starts alike for all layers of one shape: each draws one test matrix, which may be the same."""
    key = f"svdquant/{seed}/{layer.out_features}/{layer.in_features}"
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
