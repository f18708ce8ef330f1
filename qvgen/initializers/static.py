"""Hardware-friendly static quantization of video diffusion transformers (arXiv 2502.15077): nothing is dynamic at run time.

    m                        SmoothQuant's, one for all steps, from the channels' maxima over all of them
    s_t, z_t                 one scale and zero point per layer and sampling step t, for all tokens, conditional and
                             unconditional calls together: p times the range of x m at that step
    W / m                    rounded to nearest per channel

What the paper leaves open is chosen by measurement: alpha of m by the least error of the layer's outputs on a sample of its
inputs, and p, the share of the range that is kept, likewise (one p for all steps of a layer). A profile's grid of activations
keeps its bits and its kind of zero point; its tokens and groups give way to one scale, in float32.

The tables hold for one sampler and one number of steps, those of ``model.num_inference_steps``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from qvgen.config.schema.value_range import check_ranges
from qvgen.initializers.base import LayerStatistics, Need, require
from qvgen.initializers.smoothing import chosen_scale
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.fake_quant_product import to_grid_input
from qvgen.quant.affine import choose_qparams, fake_quantize, qparams_from_range
from qvgen.quant.grid import Grid, static_grid
from qvgen.quant.precision import to_float64
from qvgen.quant.runtime import Addition
from qvgen.quant.smoothing import ALPHA

SHARES = tuple(1.0 - index / 20 for index in range(17))
"""Candidates of p: 1, 0.95, ..., 0.2."""


@dataclass(frozen=True, kw_only=True)
class StaticRanges:
    """Smoothing and one scale per sampling step.

    Attributes:
        alpha: Share of the input's range that moves into the weight; None: for every layer the value with the least
            error of its output on a sample of its inputs is searched, no smoothing among the candidates.
        other_steps: What happens at a timestep that was not calibrated: ``refuse`` raises an error, ``interpolate``
            takes a mean of the two nearest steps' scales. Training and held-out errors draw any timestep and always
            interpolate.
        fold_smoothing: True folds the smoothing vector m into what stands before a layer (norms, modulations, values)
            where the model allows it; False multiplies by it everywhere.
    """

    alpha: Annotated[float | None, ALPHA]
    other_steps: Literal["refuse", "interpolate"]
    fold_smoothing: bool

    needs: frozenset[Need] = frozenset({"abs_max", "inputs", "ranges"})
    concurrent: ClassVar[bool] = True
    additions: ClassVar[frozenset[Addition]] = frozenset({"smoothing", "static"})

    def __post_init__(self) -> None:
        check_ranges(self, section="init")
        if self.other_steps not in ("refuse", "interpolate"):
            raise ValueError(f"init.other_steps={self.other_steps} is unknown; use refuse or interpolate")

    def input_scale(self, layers: Sequence[FakeQuantLinear], *, statistics: LayerStatistics) -> Tensor:
        """See :class:`qvgen.initializers.base.Smoothing`."""
        return chosen_scale(layers, statistics=statistics, alpha=self.alpha, static=True)

    @torch.no_grad()
    def initialize_(self, layer: FakeQuantLinear, *, statistics: LayerStatistics | None) -> Tensor:
        """See :class:`qvgen.initializers.base.Initializer`.

        Raises:
            ValueError: The profile rotates inputs: the ranges of a rotated input are not those of its channels.
        """
        statistics = require(require(statistics, "ranges"), "inputs")
        if layer.profile.rotation:
            raise ValueError(f"init=static has no rotation, the profile one of {layer.profile.rotation}; use 0")
        if not statistics.smoothed:
            layer.move_(profile=layer.profile, input_scale=self.input_scale([layer], statistics=statistics))
        scale, zero_point = choose_qparams(layer.weight.detach(), grid=layer.profile.weight)
        layer.weight_quantizer.start_from_(scale, zero_point)
        ranges, inputs = statistics.ranges, statistics.inputs
        assert ranges is not None
        assert inputs is not None
        if layer.input_scale is not None:
            ranges = ranges.scaled(layer.input_scale.to(ranges.low))
        rows = to_grid_input(inputs.to(layer.weight.device), layer.input_scale, profile=layer.profile)
        grid = static_grid(layer.profile.activation)
        share = best_share(rows, layer.weight.detach(), grid=grid)
        low, high = share * ranges.low.amin(1).clamp(max=0), share * ranges.high.amax(1).clamp(min=0)
        low, high = (-torch.maximum(-low, high), torch.maximum(-low, high)) if grid.symmetric else (low, high)
        layer.set_static_(timesteps=ranges.timesteps, **_tables(low, high, grid))
        layer.noise_band.strict = self.other_steps == "refuse"
        return layer.weight.detach()


def _tables(low: Tensor, high: Tensor, grid: Grid) -> dict[str, Tensor]:
    """Scale and zero point [num_steps] of ranges [num_steps]."""
    scale, zero_point = qparams_from_range(low, high, grid)
    return {"scale": scale, "zero_point": zero_point}


def best_share(rows: Tensor, weight: Tensor, *, grid: Grid) -> float:
    """The share of their range that inputs [n, K] are best rounded with: least |(Q(x) - x) W^T|^2, weight [N, K]."""
    best, least = 1.0, float("inf")
    for share in SHARES:
        clip = rows.new_full((1,), share)
        scale, zero_point = choose_qparams(rows, grid=grid, clip_low=clip, clip_high=clip)
        error = fake_quantize(rows, scale=scale, zero_point=zero_point, grid=grid) - rows
        size = float(to_float64(error @ weight.mT).square().sum())
        if size < least:
            best, least = share, size
    return best
