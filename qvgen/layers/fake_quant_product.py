"""The product of a fake-quantized Linear, with the scales outside of it, as one autograd.Function.

    Y = s_x * ((q_x - z_x) What^T) * s_w + branch + bias        What = (q_w - z_w) + (L gamma) R / s_w

It saves the input and the extremes of its rows, and recomputes codes in the backward pass; the straight-through formulas are
those of qvgen.quant.ste. Under autocast the products run in its dtype, all quantizer arithmetic in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qvgen.lowrank.phi import Phi
from qvgen.quant.affine import Rounded, choose_qparams, quantize, round_rows, row_extremes, to_rows
from qvgen.quant.grid import Grid, Profile
from qvgen.quant.hadamard import hadamard_transform
from qvgen.quant.ste import dynamic_fake_quantize_backward, fake_quantize_backward
from qvgen.quantizers.weight_lsq import WeightLSQ


@dataclass(frozen=True, kw_only=True, eq=False)
class ProductConfig:
    """All that the product reads besides the tensors that it differentiates.

    Attributes:
        weight_quantizer: Quantizer of the weight, with its grid.
        activation: Grid of the input; per_tensor: static, a scale and zero point come with each row.
        profile: The layer's, of which the rotation counts here.
        input_scale: float32 [K], before the rotation, or None.
        phi: The helper, if it is active.
        branch: (down [r, K], up [N, r]) on the input as it comes, or None.
    """

    weight_quantizer: WeightLSQ
    activation: Grid
    profile: Profile
    input_scale: Tensor | None
    phi: Phi | None
    branch: tuple[Tensor, Tensor] | None

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
        self.x = to_grid_input(x, config.input_scale, profile=config.profile)
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
        with torch.autocast(device, enabled=False):
            ops = _Operands(config, x, (first, second), weight)
            low, high = (None, None) if ops.extremes is None else ops.extremes
            ctx.save_for_backward(x, first, second, low, high, weight, scale, zero_point, phi_left, phi_right)
            # What follows is in place: the product is nobody else's, and a pass over fresh memory takes twice the time.
            y = functional.linear(ops.left.to(dtype), ops.right_raw.to(dtype)).float()
            if ops.right_zero is not None:
                y.sub_(ops.left.sum(-1, keepdim=True) * ops.right_zero)
            if ops.left_scale is not None and ops.right_scale is not None:
                y.mul_(ops.left_scale.unsqueeze(-1)).mul_(ops.right_scale)
            if config.branch is not None:
                down, up = (factor.to(dtype) for factor in config.branch)
                y.add_(functional.linear(functional.linear(x.to(dtype), down), up).float())
            if bias is not None:
                y.add_(bias.float())
            return y.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of all inputs."""
        x, first, second, low, high, weight, _, _, phi_left, phi_right = ctx.saved_tensors
        config, dtype = ctx.config, ctx.dtype
        with torch.autocast(x.device.type, enabled=False):
            grad_y = grads[0].float()
            extremes = None if low is None else (low, high)
            ops = _Operands(config, x, (first, second), weight, is_backward=True, extremes=extremes)
            by_row = grad_y if ops.right_scale is None else grad_y * ops.right_scale
            grad_x_hat = (by_row.to(dtype) @ ops.right.to(dtype)).float()
            by_column = grad_y if ops.left_scale is None else grad_y * ops.left_scale.unsqueeze(-1)
            grad_w_eff = (by_column.to(dtype).mT @ ops.left.to(dtype)).float()
            del by_row, by_column  # as large as the output; what follows needs the most memory
            grad_x, grad_first, grad_second = _activation_backward(config, ops, grad_x_hat, (first, second))
            if config.branch is not None:
                down, up = (factor.to(dtype) for factor in config.branch)
                grad_x = grad_x + ((grad_y.to(dtype) @ up) @ down).float()
            grad_weight, grad_scale, grad_zero = config.weight_quantizer.gradients(
                grad_w_eff, weight, rounded=ops.w_rounded
            )
            grad_left = grad_right = None
            if config.phi is not None:
                gate = config.phi.rank_gate
                grad_left = (grad_w_eff @ phi_right.mT) * gate
                grad_right = (phi_left * gate).mT @ grad_w_eff
            grad_bias = grad_y.sum(0) if ctx.has_bias else None
        return (
            grad_x.to(x.dtype), grad_first, grad_second, grad_weight, grad_scale, grad_zero,
            grad_left, grad_right, grad_bias, None,
        )  # fmt: skip


def _activation_backward(
    config: ProductConfig, ops: _Operands, grad: Tensor, params: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input as the model has it and of the two row parameters, from that of the quantized one."""
    if config.activation.granularity == "per_tensor":
        scale, zero_point = ops.x_qparams
        grid = row_grid(config.activation)
        grad_x, first, second = fake_quantize_backward(
            grad, ops.x, scale=scale, zero_point=zero_point, grid=grid, rounded=ops.x_rounded
        )
    else:
        grad_x, first, second = dynamic_fake_quantize_backward(
            grad,
            ops.x,
            clip_low=params[0],
            clip_high=params[1],
            grid=config.activation,
            extremes=ops.extremes,
            rounded=ops.x_rounded,
        )
    grad_x = rotated(grad_x, config.profile)
    return grad_x if config.input_scale is None else grad_x * config.input_scale, first, second


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
