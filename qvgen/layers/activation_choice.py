"""The activation quantizer that a grid asks for: static for one scale for all tokens, dynamic otherwise."""

from __future__ import annotations

from qvgen.quant.clip_start import InputKind, initial_clip
from qvgen.quant.grid import Grid
from qvgen.quantizers.activation_dynamic import ActivationDynamic
from qvgen.quantizers.activation_static import ActivationStatic

ActivationQuantizer = ActivationDynamic | ActivationStatic


def activation_quantizer(grid: Grid, *, num_bands: int, in_features: int, kind: InputKind) -> ActivationQuantizer:
    """A quantizer whose clips start where inputs of this kind and width lose least.

    Args:
        grid: Grid of the activations.
        num_bands: Noise bands, or steps of a static grid's tables.
        in_features: Columns K of the inputs.
        kind: How they are distributed.
    """
    if grid.granularity == "per_tensor":
        return ActivationStatic(grid=grid, num_bands=num_bands, in_features=in_features)
    return ActivationDynamic(grid=grid, num_bands=num_bands, start=initial_clip(grid, columns=in_features, kind=kind))
