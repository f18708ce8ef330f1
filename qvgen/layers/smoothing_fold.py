"""Moving a smoothing vector into what stands before a Linear, so that nothing is left to multiply at run time.

    y = (x m) (W / m)^T      x = the output of a norm's affine part, a modulation or a Linear, whose rows are scaled by m

Scaling output channel j of what makes x by m_j and dividing column j of every Linear that reads x by it changes no result
but by rounding, if nothing between the two mixes channels or bends them, and nobody else reads x. Which places of a model
are like that is a family's declaration (``smoothing_folds`` of :mod:`qvgen.models.base`).

A modulation's scale s is added to 1 before it multiplies: (1 + s) m = 1 + (m s + m - 1). Where a Linear with a bias makes s,
its rows are scaled by m and its bias takes the m - 1.

A scaled row of a Linear that is quantized per channel or per group quantizes as before: its scales grow by m_j.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qvgen.layers.fake_quant_linear import FakeQuantLinear


@dataclass(frozen=True, kw_only=True)
class Producer:
    """A module whose outputs are scaled: rows of its weight and bias, if it has them.

    Attributes:
        module: Name of a Linear, quantized or not, or of a norm with an affine part.
        start: First of the K rows; of a modulation's Linear, where its shift or scale begins.
        is_added_to_one: Whether the rows make a modulation's scale; the module then has a bias.
    """

    module: str
    start: int = 0
    is_added_to_one: bool = False


@dataclass(frozen=True, kw_only=True)
class SmoothingFold:
    """One place of a model where a smoothing vector disappears.

    Attributes:
        consumers: Names of all Linears that read x; they share one m.
        producers: The modules that make x; x is linear in their outputs together.
    """

    consumers: tuple[str, ...]
    producers: tuple[Producer, ...]


def behind_values(attention: str) -> SmoothingFold:
    """The place behind an attention's values: it mixes tokens, so that channel j of its output is channel j of the values.

    Args:
        attention: Name of one of diffusers' attentions, with ``to_v`` and ``to_out.0``.
    """
    return SmoothingFold(consumers=(f"{attention}.to_out.0",), producers=(Producer(module=f"{attention}.to_v"),))


@torch.no_grad()
def fold_input_scale_(model: nn.Module, fold: SmoothingFold, input_scale: Float[Tensor, " K"]) -> None:
    """Scale what makes x by m and divide the columns of what reads it by m; computed in float32 and rounded once.

    Args:
        model: Its consumers are FakeQuantLinears without an input_scale, or Linears that are not quantized.
        fold: One of the model's.
        input_scale: m, finite and not 0 anywhere.

    Raises:
        ValueError: An m of another size, or with zeros or values that are not finite; a layer with a low-rank branch, whose
            factors would have to be scaled too.
    """
    consumers = [model.get_submodule(name) for name in fold.consumers]
    for name in (*fold.consumers, *(producer.module for producer in fold.producers)):
        if getattr(model.get_submodule(name), "branch_down", None) is not None:
            raise ValueError(f"{name} has a low-rank branch already; fold before the method that makes it")
    sizes = {getattr(module, "in_features", None) for module in consumers}
    if sizes != {input_scale.numel()} or not bool((input_scale.isfinite() & (input_scale != 0)).all()):
        raise ValueError(
            f"input_scale of {', '.join(fold.consumers)} must be {sorted(map(str, sizes))} finite values other than 0"
        )
    for module in consumers:
        if isinstance(module, FakeQuantLinear):
            assert module.input_scale is None, f"one of {fold.consumers} is smoothed already"
            module.move_(profile=module.profile, input_scale=input_scale)  # W / m, in the layer's rotation
            module.declare_(profile=module.profile, input_scale=None)  # its input comes smoothed now
        else:
            assert isinstance(module, nn.Linear), f"{type(module).__name__} among {fold.consumers}"
            module.weight.copy_(module.weight.float() / input_scale.to(module.weight.device))
    for producer in fold.producers:
        module = model.get_submodule(producer.module)
        scale_rows_(module, input_scale, start=producer.start)
        if producer.is_added_to_one:
            assert isinstance(module.bias, Tensor), f"{producer.module} makes a scale and has no bias"
            bias = module.bias[producer.start : producer.start + input_scale.numel()]
            bias.copy_(bias.float() + (input_scale.to(bias.device) - 1))


def scale_rows_(module: nn.Module, factor: Tensor, *, start: int) -> None:
    """Multiply rows ``start`` to ``start + K`` of a module's weight [N, ...] and bias [N] by a factor [K]."""
    rows = slice(start, start + factor.numel())
    for name in ("weight", "bias"):
        tensor = getattr(module, name, None)
        if tensor is not None:
            assert tensor.shape[0] >= rows.stop, f"{name} {list(tensor.shape)} has no rows {rows.start}..{rows.stop}"
            part = tensor[rows]
            part.copy_(part.float() * factor.to(part.device).reshape(-1, *([1] * (part.ndim - 1))))
