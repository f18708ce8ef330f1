"""The product of a fake-quantized Linear, with the scales outside of it, as one autograd.Function.

    Y = s_x * ((q_x - z_x) What^T) * s_w + branch + bias        What = (q_w - z_w) + (L gamma) R / s_w

It saves the input and the extremes of its rows, and recomputes codes in the backward pass; the straight-through
formulas are those of qvgen.quant.ste. Under autocast the products run in its dtype, all quantizer arithmetic in float32.
Where fused operators run, they compute the same bits (:mod:`qvgen.layers.fused_product`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qvgen.layers.fused_product import RowsOfProduct, fused_backward, fused_forward, fused_weight_backward, is_fused
from qvgen.lowrank.phi import Phi
from qvgen.quant.affine import Rounded, choose_qparams, quantize, round_rows, row_extremes, to_rows
from qvgen.quant.grid import Grid, Profile
from qvgen.quant.hadamard import hadamard_transform
from qvgen.quant.ste import dynamic_fake_quantize_backward, fake_quantize_backward
from qvgen.quantizers.weight_lsq import WeightLSQ


@dataclass(frozen=True, kw_only=True, eq=False)
class ProductConfig(RowsOfProduct):
    """All that the product reads besides the tensors that it differentiates.

    Attributes:
        weight_quantizer: Quantizer of the weight, with its grid.
        activation: Grid of the input; per_tensor: static, a scale and zero point come with each row.
        profile: The layer's, of which the rotation counts here.
        input_scale: float32 [K], before the rotation, or None.
        phi: The helper, if it is active.
        branch: (down [r, K], up [N, r]) on the input as it comes, or None.
        through_zero_point: Whether the gradient takes the path through the zero point of a range taken at run time.
    """

    weight_quantizer: WeightLSQ
    activation: Grid
    profile: Profile
    input_scale: Tensor | None
    phi: Phi | None
    branch: tuple[Tensor, Tensor] | None
    through_zero_point: bool = True

    @property
    def factored(self) -> bool:
        """Whether both scales can leave the sum over columns."""
        one_per_row = self.activation.granularity in ("per_token", "per_tensor")
        return self.weight_quantizer.grid.granularity == "per_channel" and one_per_row


def rotated(x: Tensor, profile: Profile) -> Tensor:
    """The profile's rotation of x [..., K], float32, its own inverse and transpose; x itself where there is none."""
    if not profile.rotation:
        return x
    return hadamard_transform(x, block_size=profile.rotation, kind=profile.rotation_kind)


def to_grid_input(x: Tensor, input_scale: Tensor | None, *, profile: Profile) -> Tensor:
    """Bring an input [..., K] to the coordinates in which it is quantized: float32 H (x m), smoothed and rotated."""
    x = x.float()
    return rotated(x if input_scale is None else x * input_scale, profile)


def row_grid(grid: Grid) -> Grid:
    """The grid of single rows: a static grid, whose scale was gathered for each row, is one of tokens."""
    return replace(grid, granularity="per_token") if grid.granularity == "per_tensor" else grid


def row_qparams(
    rows: Tensor, params: tuple[Tensor, Tensor], grid: Grid, *, extremes: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of rows [M, K]: from their extremes and clips, or (static) as they were given."""
    if grid.granularity == "per_tensor":
        return params
    return choose_qparams(rows, grid=grid, clip_low=params[0], clip_high=params[1], extremes=extremes)


def input_codes(rows: Tensor, params: tuple[Tensor, Tensor], grid: Grid) -> Tensor:
    """Codes of rows [M, K] of :func:`to_grid_input`.

    Args:
        rows: float32 [M, K].
        params: float32 [M, 1] each: low and high clip factor, or (static) scale and zero point.
        grid: The activations'.
    """
    scale, zero_point = row_qparams(rows, params, grid)
    return quantize(rows, scale=scale, zero_point=zero_point, grid=row_grid(grid))


def _operand(x: Tensor, rounded: Rounded, *, factored: bool) -> tuple[Tensor, Tensor | None]:
    """One side of the product and its scale outside: (q - z, s [rows]), or (s (q - z), None)."""
    if factored:
        return rounded.centered.reshape(x.shape), rounded.scale.reshape(-1)
    return (rounded.scale * rounded.centered).reshape(x.shape), None


class _Operands:
    """Both sides of the product as the forward pass uses them; built again by the backward pass (``is_backward``).

    ``x`` is :func:`_grid_rows` of the input.

    ``extremes`` are :func:`qvgen.quant.affine.row_extremes` of the input's rows, which the backward pass has from the forward
    pass; None where ranges are static.
    """

    def __init__(
        self,
        config: ProductConfig,
        x: Tensor,
        params: tuple[Tensor, Tensor],
        weight: Tensor,
        *,
        is_backward: bool = False,
        extremes: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        factored, grid = config.factored, row_grid(config.activation)
        self.x = x.float()
        is_dynamic = config.activation.granularity != "per_tensor"
        self.extremes = row_extremes(to_rows(self.x, grid), grid) if is_dynamic and extremes is None else extremes
        self.x_qparams = row_qparams(self.x, params, config.activation, extremes=self.extremes)
        scale, zero_point = self.x_qparams
        self.x_rounded = round_rows(self.x, scale=scale, zero_point=zero_point, grid=grid, with_unclamped=is_backward)
        self.left, self.left_scale = _operand(self.x, self.x_rounded, factored=factored)
        (scale, zero_point), w_grid = config.weight_quantizer.qparams(), config.weight_quantizer.grid
        self.w_rounded = round_rows(
            weight.detach().float(), scale=scale, zero_point=zero_point, grid=w_grid, with_unclamped=is_backward
        )
        self.right, self.right_scale = _operand(weight, self.w_rounded, factored=factored)
        # A real zero point is no whole number: the product takes raw codes, and z * (row sum of X) is subtracted after it,
        # as the kernels do. ``right`` is What all the same, for the backward pass.
        self.right_zero = None
        raw = self.right
        if factored and w_grid.zero_point == "real":
            self.right_zero = zero_point.reshape(-1)
            raw = (self.right + zero_point).round()
        if config.phi is not None:
            helper = config.phi.weight().detach()
            helper = helper / scale if factored else helper
            self.right, raw = self.right + helper, raw + helper
        self.right_raw = raw


class FakeQuantProduct(torch.autograd.Function):
    """Y [M, N] of x [M, K].

    Differentiable inputs, in this order: x, the two row parameters of :func:`input_codes`, weight, scale and zero point
    of the weight, L and R of Phi, bias; then the :class:`ProductConfig`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor, *rest: Any) -> Tensor:
        """Compute the product; see the class."""
        weight, scale, zero_point, phi_left, phi_right, bias, config = rest
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.config, ctx.dtype, ctx.has_bias = config, dtype, bias is not None
        with _without_autocast(device):
            rows = _grid_rows(config, x)
            if is_fused(config, rows, weight):
                added = (_branch(config, x, dtype), bias)
                y, low, high = fused_forward(config, rows, (first, second), weight, added=added, dtype=dtype)
            else:
                ops = _Operands(config, rows, (first, second), weight)
                low, high = (None, None) if ops.extremes is None else ops.extremes
                y = _product(config, ops, x, bias, dtype=dtype)
            ctx.save_for_backward(x, first, second, low, high, weight, scale, zero_point, phi_left, phi_right)
            return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of all inputs."""
        x, first, second, low, high, weight, _, _, phi_left, phi_right = ctx.saved_tensors
        config, dtype = ctx.config, ctx.dtype
        with _without_autocast(x.device.type):
            grad_y = grads[0].float()
            extremes = None if low is None else (low, high)
            rows = _grid_rows(config, x)
            if fused := is_fused(config, rows, weight):
                saved = (rows, first, second, weight)
                grad_x, params, grad_w_eff = fused_backward(config, saved, extremes, grad_y, dtype=dtype)
            else:
                ops = _Operands(config, rows, (first, second), weight, is_backward=True, extremes=extremes)
                grad_x_hat, grad_w_eff = _operand_gradients(ops, grad_y, dtype=dtype)
                grad_x, *params = _activation_backward(config, ops, grad_x_hat, (first, second))
            del rows
            grad_x = _to_input_gradient(config, grad_x)
            if config.branch is not None:
                down, up = (factor.to(dtype) for factor in config.branch)
                grad_x = grad_x + ((grad_y.to(dtype) @ up) @ down).float()
            if fused:  # the gradient of the effective weight becomes the weight's, in place
                of_phi = _phi_gradients(config, grad_w_eff, phi_left, phi_right)
                of_weight = fused_weight_backward(config, grad_w_eff, weight)
            else:
                of_weight = config.weight_quantizer.gradients(grad_w_eff, weight, rounded=ops.w_rounded)
                of_phi = _phi_gradients(config, grad_w_eff, phi_left, phi_right)
            grad_bias = grad_y.sum(0) if ctx.has_bias else None
        return grad_x.to(x.dtype), *params, *of_weight, *of_phi, grad_bias, None


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _grid_rows(config: ProductConfig, x: Tensor) -> Tensor:
    """The input in the coordinates in which it is quantized, float32; x itself, of any dtype, where those are its own."""
    if config.input_scale is None and not config.profile.rotation:
        return x
    return to_grid_input(x, config.input_scale, profile=config.profile)


def _to_input_gradient(config: ProductConfig, grad: Tensor) -> Tensor:
    """The gradient of an input as the model has it, from that of :func:`_grid_rows`."""
    grad = rotated(grad, config.profile)
    return grad if config.input_scale is None else grad * config.input_scale


def _branch(config: ProductConfig, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    if config.branch is None:
        return None
    down, up = (factor.to(dtype) for factor in config.branch)
    return functional.linear(functional.linear(x.to(dtype), down), up)


def _product(config: ProductConfig, ops: _Operands, x: Tensor, bias: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    """The product with its scales; what follows it is in place, as a pass over fresh memory takes twice the time."""
    y = functional.linear(ops.left.to(dtype), ops.right_raw.to(dtype)).float()
    if ops.right_zero is not None:
        y.sub_(ops.left.sum(-1, keepdim=True) * ops.right_zero)
    if ops.left_scale is not None and ops.right_scale is not None:
        y.mul_(ops.left_scale.unsqueeze(-1)).mul_(ops.right_scale)
    if (branch := _branch(config, x, dtype)) is not None:
        y.add_(branch.float())
    if bias is not None:
        y.add_(bias.float())
    return y.to(dtype)


def _operand_gradients(ops: _Operands, grad_y: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of the quantized input [M, K] and of the effective weight [N, K], float32."""
    by_row = grad_y if ops.right_scale is None else grad_y * ops.right_scale
    grad_x_hat = (by_row.to(dtype) @ ops.right.to(dtype)).float()
    by_column = grad_y if ops.left_scale is None else grad_y * ops.left_scale.unsqueeze(-1)
    return grad_x_hat, (by_column.to(dtype).mT @ ops.left.to(dtype)).float()


def _phi_gradients(
    config: ProductConfig, grad: Tensor, left: Tensor | None, right: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of L and R, from that of the effective weight [N, K]."""
    if config.phi is None or left is None or right is None:
        return None, None
    gate = config.phi.rank_gate
    return (grad @ right.mT) * gate, (left * gate).mT @ grad


def _activation_backward(
    config: ProductConfig, ops: _Operands, grad: Tensor, params: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input in its grid's coordinates and of the two row parameters, from that of the quantized one."""
    if config.activation.granularity == "per_tensor":
        scale, zero_point = ops.x_qparams
        grid = row_grid(config.activation)
        return fake_quantize_backward(grad, ops.x, scale=scale, zero_point=zero_point, grid=grid, rounded=ops.x_rounded)
    return dynamic_fake_quantize_backward(
        grad,
        ops.x,
        clips=params,
        grid=config.activation,
        extremes=ops.extremes,
        rounded=ops.x_rounded,
        through_zero_point=config.through_zero_point,
    )


class TouchParameters(torch.autograd.Function):
    """The identity of its first input; the others, which it may not depend on, get gradients of zero.

    Data-parallel training needs a gradient of every parameter on every process: which widths of a table a process meets
    depends on its own samples, and shares of gradients that another process does not have would be mixed up.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, *parameters: Tensor) -> Tensor:
        """Return the value."""
        ctx.save_for_backward(*parameters)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Pass the gradient on, and zeros."""
        return grads[0], *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)
