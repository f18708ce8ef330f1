"""Smoothing vectors go into what stands before a layer, where the model's family says that they can.

For every place (:class:`qvgen.layers.smoothing_fold.SmoothingFold`) the method chooses one m for all Linears that read the
same input, from their weights together; they start without an input_scale then. Everywhere else each layer keeps its own m as
a multiplication before quantization.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qvgen.initializers.base import LayerStatistics, Smoothing, require
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.fake_quant_product import to_grid_input
from qvgen.layers.smoothing_fold import SmoothingFold, fold_input_scale_
from qvgen.quant.grid import static_grid
from qvgen.quant.smoothing import search_alpha, smoothing_scale

log = logging.getLogger(__name__)


def chosen_scale(
    layers: Sequence[FakeQuantLinear], *, statistics: LayerStatistics, alpha: float | None, static: bool = False
) -> Tensor:
    """SmoothQuant's m for layers that read the same input, from all their rows together.

    Args:
        layers: In the model's own coordinates, or rotated.
        statistics: Statistics of their input, with a sample of it where ``alpha`` is None.
        alpha: How much of the input's range moves into the weight; None: the value with the least error of the outputs,
            or no smoothing (m = 1).
        static: The search rounds inputs with one scale for all of them, not with one per token.
    """
    weight, profile = torch.cat([layer.original_weight() for layer in layers]), layers[0].profile
    largest = require(statistics, "abs_max").abs_max.amax(0).to(weight.device)
    if alpha is None:
        inputs = require(statistics, "inputs").inputs
        assert inputs is not None
        factor, _ = search_alpha(
            inputs.to(weight),
            weight,
            activation_abs_max=largest,
            weight_grid=profile.weight,
            activation_grid=static_grid(profile.activation) if static else profile.activation,
            transform=lambda x: to_grid_input(x, None, profile=profile),
        )
        return factor
    return smoothing_scale(largest, weight, alpha=alpha)


def fold_smoothing_(
    model: nn.Module,
    initializer: Smoothing,
    *,
    folds: Sequence[SmoothingFold],
    statistics: Callable[[str], LayerStatistics],
) -> dict[str, Tensor]:
    """Smooth a prepared model at every fold, before any of its layers is set up.

    Args:
        model: Its master weights are those of the full-precision model, its layers have no input_scale.
        initializer: The PTQ method, which chooses m.
        folds: Places, in an order in which a layer's rows are scaled before its own input is smoothed: the m of to_out
            scales the rows of to_v, and the m of to_q, to_k and to_v is chosen from the rows that result.
        statistics: A layer's name -> what calibration saw of it.

    Returns:
        m of every quantized layer whose input comes smoothed now, by name.
    """
    factors: dict[str, Tensor] = {}
    for fold in folds:
        assert not any(producer.module in factors for producer in fold.producers), f"{fold} comes too late"
        layers = {name: model.get_submodule(name) for name in fold.consumers}
        quantized = {name: layer for name, layer in layers.items() if isinstance(layer, FakeQuantLinear)}
        if not quantized:
            continue
        seen = statistics(next(iter(quantized)))  # all of these layers read the same input
        factor = initializer.input_scale(list(quantized.values()), statistics=seen)
        fold_input_scale_(model, fold, factor)
        factors |= dict.fromkeys(quantized, factor)
    log.info("smoothing of %d layers is folded into what stands before them", len(factors))
    return factors
