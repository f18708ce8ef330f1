"""DVD-Quant (arXiv 2505.18663), data-free: rotate the input, refine every row's grid (BGR).

    W' = W H, H a Hadamard matrix of the whole row            outliers spread over all columns
    s, z, codes by turns from a clamped range                 :func:`qvgen.quant.bgr.refine_grid`
    X' = X H, quantized online with a scale of each token     ARQ with the profile's activation grid

ARQ's D is one scale per block of channels; here it is what the profile says: one per token, or per token and group of 64
(``profile=svdq_g64``). delta-GBS, the switch between 4- and 8-bit activations while sampling, works with any method:
``activation_switch.widths`` (:mod:`qvgen.deploy.delta_switch`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from qvgen.initializers.base import LayerStatistics, Need
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.quant.bgr import refine_grid
from qvgen.quant.hadamard import largest_block


@dataclass(frozen=True, kw_only=True)
class DvdQuant:
    """Rotation and refined grids.

    Attributes:
        rotate: False leaves the profile's own rotation, for the method's ablation.
    """

    rotate: bool

    needs: frozenset[Need] = frozenset()

    def initialize_(self, layer: FakeQuantLinear, *, statistics: LayerStatistics | None) -> Tensor:
        """See :class:`qvgen.initializers.base.Initializer`."""
        del statistics
        if self.rotate:
            layer.move_(profile=replace(layer.profile, rotation=largest_block(layer.in_features)))
        refined = refine_grid(layer.weight.detach(), grid=layer.profile.weight)
        layer.weight_quantizer.start_from_(refined.scale, refined.zero_point)
        return layer.weight.detach()
