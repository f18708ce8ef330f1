"""Clips of inputs that were sampled: for every layer those with which its own output loses least.

Layers that read the same input and quantize it alike get the same clips, chosen by the errors of all their outputs, so that
they can go on sharing one quantizer (:mod:`qvgen.layers.shared_input`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch

from qvgen.initializers.base import LayerStatistics, Need, require
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.fake_quant_product import to_grid_input
from qvgen.layers.shared_input import alike_sets
from qvgen.quant.clip_start import search_clips
from qvgen.quant.grid import Profile
from qvgen.quantizers.activation_dynamic import ActivationDynamic


def needs_with_inputs(needs: Iterable[Need], profile: Profile, *, is_searched: bool) -> frozenset[Need]:
    """Kinds of statistics to collect: those that a PTQ method needs, and inputs where clips are searched by them."""
    has_clips = profile.activation.clip and profile.activation.granularity != "per_tensor"
    return frozenset(needs) | ({"inputs"} if is_searched and has_clips else frozenset())


def start_clips_(
    layers: Mapping[str, FakeQuantLinear],
    sets: Iterable[Sequence[str]],
    *,
    statistics: Callable[[str], LayerStatistics],
) -> None:
    """Start the clips of all layers, in all their widths, where the inputs that were sampled lose least.

    Layers without clips (static ranges, profiles of runtimes that have none) are left as they are.

    Args:
        layers: Set up by a PTQ method: by their coordinates and weights the clips are chosen.
        sets: Names of layers that read the same input.
        statistics: A layer's name -> what was seen of its inputs, ``inputs`` among it.
    """
    together = alike_sets(layers, sets)
    alone = [name for name in layers if not any(name in names for names in together)]
    for names in (*together, *((name,) for name in alone)):
        _start_together_([layers[name] for name in names], partial(statistics, names[0]))


@torch.no_grad()
def _start_together_(layers: Sequence[FakeQuantLinear], statistics: Callable[[], LayerStatistics]) -> None:
    rows = None  # read once, and only for layers that have clips
    for bits, quantizer in layers[0].activation_quantizers().items():
        if not isinstance(quantizer, ActivationDynamic) or quantizer.clip_high is None:
            continue
        if rows is None:
            inputs = require(statistics(), "inputs").inputs
            assert inputs is not None
            inputs = inputs.to(layers[0].weight.device)
            rows = to_grid_input(inputs, layers[0].input_scale, profile=layers[0].profile)
        clips = search_clips(rows, [layer.weight for layer in layers], grid=quantizer.grid)
        for layer in layers:
            own = layer.activation_quantizers()[bits]
            assert isinstance(own, ActivationDynamic)
            own.start_from_(*clips)
