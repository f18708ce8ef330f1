"""The product of a fake-quantized Linear on fused operators: a pass over x or W where torch takes ten.

:mod:`qvgen.layers.fake_quant_product` is the definition, in torch. What stands here computes the same bits with the
operators of ``qvgen_kernels.fake_quantize``, where the device has them (:func:`is_fused`). In one pass each: the extremes
of rows, scales, zero points and codes; the straight-through gradients, and the operand that the other side's gradient
needs; the scales around the product. Matrix products, sums over rows and the rotation stay torch's.

Not fused, and computed by torch with the same bits: devices without operators, machines without a C++ compiler (CPU) or
Triton (CUDA), second derivatives, inputs whose columns do not lie side by side, and what a compiler or a plan of memory
traces (so a plan counts torch's temporaries, of which there are more). The bits are those of torch on a CPU: on CUDA torch
alone adds rows up in another order, which gradients of clips, scales and zero points show in their last bits. In a row with
a NaN, whose gradient means nothing, torch's own bits depend on where the row lies; here dx is 0 outside of what such a row
shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.utils import checkpoint
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from qvgen.layers import integer_product
from qvgen.quant.affine import scale_bounds
from qvgen.quant.grid import Grid
from qvgen_kernels.fake_quantize import RowSpec, operators, refusal

if TYPE_CHECKING:
    from qvgen.layers.fake_quant_product import ProductConfig


@dataclass(frozen=True, kw_only=True)
class ProductRows:
    """How the fused operators are told to quantize both sides of a product.

    Attributes:
        input: The input's rows.
        weight: The weight's rows, as gradients see them.
        input_text: ``input`` as the operators' argument.
        weight_text: ``weight``, likewise.
        operand_text: The weight's rows as the product takes them: raw codes where their real zero point stays outside.
        whole: Whether without Phi both operands are int8 numbers, and their float32 sums exact.
    """

    input: RowSpec
    weight: RowSpec
    input_text: str
    weight_text: str
    operand_text: str
    whole: bool


class RowsOfProduct:
    """The part of a product's configuration that the fused operators read, made once for all passes."""

    @cached_property
    def rows(self) -> ProductRows:
        """The facts of both sides, as the operators take them."""
        config = cast("ProductConfig", self)
        quantizer = config.weight_quantizer
        return product_rows(
            config.activation,
            quantizer.grid,
            (quantizer.columns * quantizer.scale.shape[1], quantizer.columns),
            factored=config.factored,
            through_zero_point=config.through_zero_point,
            factor=quantizer.gradient_scale,
        )


_CHECKPOINT_MODES = (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode)
_switch = {"on": True}


@contextmanager
def unfused() -> Iterator[None]:
    """Compute with torch alone inside: for checks that want the definition, and for measuring one against the other."""
    before, _switch["on"] = _switch["on"], False
    try:
        yield
    finally:
        _switch["on"] = before


def is_fused(config: ProductConfig, x: Tensor, weight: Tensor) -> bool:
    """Whether the fused operators compute this product [M, K] x [N, K] here, now, and with torch's bits."""
    if not _switch["on"] or torch.compiler.is_compiling() or _is_watched():
        return False
    if torch.is_grad_enabled():  # in a backward pass of which somebody wants the derivative
        return False
    rows = config.rows
    return x.device == weight.device and refusal(x, rows.input) is None and refusal(weight, rows.weight) is None


def _is_watched() -> bool:
    """Whether somebody wants to see torch's own operators: a plan, a tracer."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    modes = _get_current_dispatch_mode_stack()  # who keeps attention's outputs, or counts fused operators, does not
    return not all(isinstance(mode, _CHECKPOINT_MODES) or getattr(mode, "sees_fused", False) for mode in modes)


def fused_forward(
    config: ProductConfig,
    x: Tensor,
    params: tuple[Tensor, Tensor],
    weight: Tensor,
    *,
    added: tuple[Tensor | None, Tensor | None],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The product and what is saved of its input.

    Args:
        config: The product's.
        x: [M, K], smoothed and rotated.
        params: float32 [M, 1] each: clip factors, or (static) scale and zero point.
        weight: [N, K].
        added: The branch's output [M, N] of ``dtype``, and the bias [N].
        dtype: Type of the matrix product.

    Returns:
        y [M, N] of ``dtype``, and the rows' extremes as :func:`qvgen.quant.affine.row_extremes` has them, or None.
    """
    fused = operators(x)
    whole = config.rows.whole and config.phi is None and integer_product.runs_here(x, len(weight))
    operand = torch.int8 if whole else dtype
    left, left_scale, _, low, high, row_sum = fused.quantize_rows(x, params, None, config.rows.input_text, operand)
    right, right_scale, zero = _right(config, weight, dtype=operand, raw=True)
    y = integer_product.product(left, right, dtype=dtype)
    is_real = config.factored and config.weight_quantizer.grid.zero_point == "real"
    scales = (left_scale, right_scale) if config.factored else (None, None)
    zeros = (row_sum, zero) if is_real else (None, None)
    fused.scale_output(y, *scales, *zeros, *added)
    if config.activation.granularity == "per_tensor":
        return y, None, None
    if config.activation.granularity == "per_group":
        return y, low.unsqueeze(-1), high.unsqueeze(-1)
    return y, low, high


def fused_backward(
    config: ProductConfig,
    saved: Sequence[Tensor],
    extremes: tuple[Tensor, Tensor] | None,
    grad_y: Tensor,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Gradients on the input's side.

    Args:
        config: The product's.
        saved: x as :func:`fused_forward` got it, its two row parameters, the weight.
        extremes: What that returned.
        grad_y: float32 [M, N].
        dtype: Type of the matrix products.

    Returns:
        Gradients, float32, of x [M, K], of the two row parameters [M, 1], and of the effective weight [N, K].
    """
    x, first, second, weight = saved
    fused, text = operators(x), config.rows.input_text
    right, right_scale, _ = _right(config, weight, dtype=dtype, raw=False)
    if not config.factored:
        by_row = by_column = grad_y.to(dtype)
    else:
        left_scale = first if extremes is None else fused.row_scales(extremes, (first, second), text)
        if grad_y.is_contiguous():
            by_row, by_column = fused.scale_gradient(grad_y, left_scale, right_scale, dtype)
        else:  # BLAS sums other layouts in another order, and torch's products keep them
            by_row, by_column = (grad_y * right_scale.reshape(-1)).to(dtype), (grad_y * left_scale).to(dtype)
    grad = (by_row @ right).float()
    del by_row, right
    left, grad_first, grad_second = fused.quantize_rows_backward(grad, x, (first, second), extremes or (), text, dtype)
    grad_w_eff = (by_column.mT @ left).float()
    if extremes is not None:
        grad_first, grad_second = (
            value.sum(-1, keepdim=True) if value.shape[1] > 1 else value for value in (grad_first, grad_second)
        )
    return grad, (grad_first, grad_second), grad_w_eff


def fused_weight_backward(config: ProductConfig, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weight's gradients, as ``WeightLSQ.gradients`` gives them; ``grad`` [N, K] becomes the first of them."""
    params, text = _weight_params(config), config.rows.weight_text
    _, grad_scale, grad_zero = operators(weight).quantize_rows_backward(grad, weight, params, (), text, None)
    return grad, grad_scale, grad_zero if len(params) == 2 else None


def _weight_params(config: ProductConfig) -> list[Tensor]:
    """Scale and zero point as they are learned; a symmetric weight has no zero point."""
    quantizer = config.weight_quantizer
    return [value.detach() for value in (quantizer.scale, quantizer.zero_point) if value is not None]


def _right(config: ProductConfig, weight: Tensor, *, dtype: torch.dtype, raw: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The right operand [N, K] with Phi, the weight's scales and (real) zero points [N, G]."""
    helper = None if config.phi is None else config.phi.weight().detach()
    text = config.rows.operand_text if raw else config.rows.weight_text
    made = operators(weight).quantize_rows(weight.detach(), _weight_params(config), helper, text, dtype)
    return made[0], made[1], made[2]


@lru_cache(maxsize=1024)
def product_rows(
    activation: Grid, weight: Grid, columns: tuple[int, int], *, factored: bool, through_zero_point: bool, factor: float
) -> ProductRows:
    """The facts of a product, as the operators take them; they are asked for in each pass, and made once.

    Args:
        activation: Grid of the input.
        weight: Grid of the weight.
        columns: Number of the input's columns, and of those that share a weight's scale.
        factored: Whether scales stay outside of the product.
        through_zero_point: Whether the input's gradient takes the path through its zero point.
        factor: On the gradients of the weight's scale and zero point.
    """
    is_real = factored and weight.zero_point == "real"
    inputs = _row_spec(activation, columns[0], factored, is_real, None)
    inputs = inputs if through_zero_point else replace(inputs, through_zero_point=False)
    own = _row_spec(weight, columns[1], factored, False, factor)
    operand = _row_spec(weight, columns[1], factored, is_real, factor)
    texts = {"input_text": inputs.to_string(), "weight_text": own.to_string(), "operand_text": operand.to_string()}
    whole = integer_product.are_whole(inputs, operand, columns=columns[0])
    return ProductRows(input=inputs, weight=own, whole=whole, **texts)


def _row_spec(grid: Grid, columns: int, factored: bool, zero_outside: bool, factor: float | None) -> RowSpec:
    """How a side is quantized.

    Args:
        grid: The grid of the side.
        columns: Number of columns of a row, or of one of its groups.
        factored: Whether scales stay outside of the product.
        zero_outside: Whether the weight's real zero point does, too: inputs are summed for it, codes of weights are raw.
        factor: On the gradients of a weight's scale and zero point; None: the rows are an input's.
    """
    is_weight, is_static = factor is not None, grid.granularity == "per_tensor"
    floor, ceiling = scale_bounds(grid)
    return RowSpec(
        kind="learned" if is_weight else "static" if is_static else "dynamic",
        qmin=grid.qmin,
        qmax=grid.qmax,
        zero_point=grid.zero_point,
        group=grid.group_size or columns,
        arithmetic=grid.arithmetic,
        scale_dtype=grid.scale_dtype,
        floor=floor,
        ceiling=ceiling,
        factor=1.0 if factor is None else factor,
        factored=factored,
        raw=is_weight and zero_outside,
        row_sums=not is_weight and zero_outside,
    )
