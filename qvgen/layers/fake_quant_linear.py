"""A Linear that trains on the grid it will run on (QVGen, arXiv 2505.11497, Sec. 3).

    Y = Q(X) (Q(W) + (L gamma) R)^T + bias

in the layer's own coordinates, X = H (x m) of the model's x (rotation H and smoothing m, where there are any), and computed
with the scales outside of the product, as the integer kernels do:

    Y = s_x * ((q_x - z_x) What^T) * s_w + bias        What = (q_w - z_w) + (L gamma) R / s_w

(q - z) are whole numbers of at most 8 bits and a sign: exact in bfloat16 and float32. In float32, and as long as a sum
stays below 2^24, the product is exact too, so that once Phi is gone this layer and the packed one agree bit for
bit. Where a scale belongs to a group of columns it can't leave the sum: both sides are dequantized before the product.

One autograd.Function for the layer: it saves the input and recomputes codes and ranges in the backward pass; the
straight-through formulas are those of qvgen.quant.ste. Under autocast the two products run in its dtype, all
quantizer arithmetic in float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qvgen.layers.noise_band import NoiseBand
from qvgen.lowrank.phi import Phi
from qvgen.quant.affine import choose_qparams, qparams_to_rows, quantize, round_to_grid, to_rows
from qvgen.quant.grid import Grid, Profile
from qvgen.quant.hadamard import hadamard_transform
from qvgen.quant.ste import dynamic_fake_quantize_backward
from qvgen.quantizers.activation_dynamic import ActivationDynamic
from qvgen.quantizers.weight_lsq import WeightLSQ


class FakeQuantLinear(nn.Module):
    """Linear with a fake-quantized weight and input, and optionally Phi.

    Args:
        linear: The layer to replace; its weight (rotated if the profile says so) and bias are copied to float32.
        profile: The two grids and the rotation.
        noise_band: Shared with the other layers of the model.
        phi_rank: Rank of Phi; 0 for none.

    Attributes:
        weight: Parameter float32 [N, K], the master weight (W H under a rotation).
        bias: Parameter float32 [N] or None.
        weight_quantizer: Learned scale and zero point.
        activation_quantizer: Learned clips.
        phi: The helper, or None.
        input_scale: buffer float32 [K]: the input is multiplied with it first (smoothing); None: with nothing.

    Raises:
        ValueError: The profile's groups or rotation do not fit K, or the rank does not fit the layer.
    """

    bias: nn.Parameter | None
    input_scale: Tensor | None

    def __init__(self, linear: nn.Linear, *, profile: Profile, noise_band: NoiseBand, phi_rank: int = 0) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        profile.check_fits(self.in_features)
        self.profile = profile
        self.noise_band = noise_band
        weight = linear.weight.detach().float()
        weight = hadamard_transform(weight, block_size=profile.rotation) if profile.rotation else weight.clone()
        self.weight = nn.Parameter(weight)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().float().clone())
        self.weight_quantizer = WeightLSQ(
            out_features=self.out_features, in_features=self.in_features, grid=profile.weight
        ).to(weight.device)
        self.activation_quantizer = ActivationDynamic(grid=profile.activation, num_bands=noise_band.num_bands).to(
            weight.device
        )
        self.register_buffer("input_scale", None)
        self.phi = None
        if phi_rank:
            self.phi = Phi(out_features=self.out_features, in_features=self.in_features, rank=phi_rank).to(
                weight.device
            )

    @torch.no_grad()
    def move_(self, *, profile: Profile, input_scale: Tensor | None = None) -> None:
        """Quantize in other coordinates, or with other bits: X' = H (X m), W' = H (W / m); the product is the same.

        The master weight is rewritten in place, in float32. Scales and zero points keep their values, so a PTQ method has to
        choose them afterwards.

        Args:
            profile: The new one; its bits and rotation may differ, the rest must be the layer's.
            input_scale: m, float32 [K], not 0 anywhere; None leaves the input as it is.

        Raises:
            ValueError: Another granularity, group size or kind of zero point, a rotation that does not fit, or an m with
                zeros or values that are not finite.
        """
        profile.check_fits(self.in_features)
        for side in ("weight", "activation"):
            mine, other = getattr(self.profile, side), getattr(profile, side)
            if replace(mine, bits=other.bits) != other:
                raise ValueError(f"{side} grid {other} differs in more than bits from the layer's {mine}")
        weight = self.original_weight()
        if input_scale is not None:
            if input_scale.shape != (self.in_features,) or not bool(
                (input_scale.isfinite() & (input_scale != 0)).all()
            ):
                raise ValueError(f"input_scale must be {self.in_features} finite values other than 0")
            input_scale = input_scale.to(weight)
            weight = weight / input_scale
        self.weight.copy_(hadamard_transform(weight, block_size=profile.rotation) if profile.rotation else weight)
        self.declare_(profile=profile, input_scale=input_scale)

    def declare_(self, *, profile: Profile, input_scale: Tensor | None) -> None:
        """Set what :meth:`move_` sets besides the weight, before a state is loaded."""
        self.profile = profile
        self.input_scale = input_scale
        self.weight_quantizer.set_bits_(profile.weight.bits)
        self.activation_quantizer.set_bits_(profile.activation.bits)

    @torch.no_grad()
    def original_weight(self) -> Tensor:
        """The master weight in the model's own coordinates, float32 [N, K]: not rotated, not smoothed."""
        weight = self.weight.detach().float()
        if self.profile.rotation:
            weight = hadamard_transform(weight, block_size=self.profile.rotation)
        return weight.clone() if self.input_scale is None else weight * self.input_scale

    def start_phi_(self, *, generator: torch.Generator, target: Tensor | None = None) -> None:
        """Start Phi from what the weight quantizer loses.

        ``target``, float32 [N, K], is what Q(W) + Phi shall be, in the layer's coordinates; None: the master weight.
        """
        if self.phi is not None:
            target = self.weight.detach() if target is None else target
            self.phi.start_from_(target - self.weight_quantizer.fake_quantize(self.weight), generator=generator)

    def quantized_weight(self) -> Tensor:
        """Q(W), float32 [N, K]: no Phi, no gradient."""
        return self.weight_quantizer.fake_quantize(self.weight)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """W_eff = Q(W) + (L gamma) R, float32 [N, K]; no gradient."""
        quantized = self.quantized_weight()
        return quantized if self.phi is None or not self.phi.active else quantized + self.phi.weight()

    def row_clips(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Clip factors of every row of an input [B * n, ..., K] by its sample's noise band: two of float32 [M, 1]."""
        index = self.noise_band.row_index(x)
        shape = (x.shape[0], *([1] * (x.ndim - 1)))
        low, high = (table[index].reshape(shape) for table in self.activation_quantizer.clip_tables())
        return low.expand(*x.shape[:-1], 1).reshape(-1, 1), high.expand(*x.shape[:-1], 1).reshape(-1, 1)

    @torch.no_grad()
    def input_codes(self, x: Tensor) -> Tensor:
        """Codes of an input [B * n, ..., K] as the layer quantizes it, [M, K]; for counting differences."""
        rows = to_grid_input(x.reshape(-1, self.in_features), self.input_scale, rotation=self.profile.rotation)
        return input_codes(rows, self.row_clips(x), self.profile)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: [B * n, ..., K], rows ordered by sample.

        Returns:
            [B * n, ..., N] in x's dtype, or autocast's.
        """
        clip_low, clip_high = self.row_clips(x)
        phi = self.phi if self.phi is not None and self.phi.active else None
        y = _FakeQuantLinear.apply(
            x.reshape(-1, self.in_features),
            clip_low,
            clip_high,
            self.weight,
            self.weight_quantizer.scale,
            self.weight_quantizer.zero_point,
            None if phi is None else phi.left,
            None if phi is None else phi.right,
            self.bias,
            self,
        )
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes for ``print(model)``."""
        return f"{self.in_features} -> {self.out_features}, {self.profile.name} {self.profile.label}"


def to_grid_input(x: Tensor, input_scale: Tensor | None, *, rotation: int) -> Tensor:
    """What is quantized of an input [..., K]: float32 H (x m)."""
    x = x.float()
    x = x if input_scale is None else x * input_scale
    return hadamard_transform(x, block_size=rotation) if rotation else x


def input_codes(rows: Tensor, clips: tuple[Tensor, Tensor], profile: Profile) -> Tensor:
    """Codes of rows [M, K] of :func:`to_grid_input` under a profile; ``clips`` are float32 [M, 1] each."""
    scale, zero_point = choose_qparams(rows, grid=profile.activation, clip_low=clips[0], clip_high=clips[1])
    return quantize(rows, scale=scale, zero_point=zero_point, grid=profile.activation)


def _centered(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Q - z as float32 [..., K]."""
    rows = to_rows(x, grid)
    row_scale, row_zero = qparams_to_rows(scale, grid), qparams_to_rows(zero_point, grid)
    codes = round_to_grid(rows, row_scale, row_zero, grid).clamp_(grid.qmin, grid.qmax)
    return codes.sub_(row_zero).reshape(x.shape)


def _operand(
    x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, *, factored: bool
) -> tuple[Tensor, Tensor | None]:
    """One side of the product and its scale outside: (q - z, s [rows]), or (s (q - z), None)."""
    centered = _centered(x, scale, zero_point, grid)
    if factored:
        return centered, scale.reshape(-1)
    return (qparams_to_rows(scale, grid) * to_rows(centered, grid)).reshape(x.shape), None


class _Operands:
    """Both sides of the product as the forward pass uses them; built again by the backward pass."""

    def __init__(self, layer: FakeQuantLinear, x: Tensor, clip_low: Tensor, clip_high: Tensor) -> None:
        profile = layer.profile
        factored = profile.weight.granularity == "per_channel" and profile.activation.granularity == "per_token"
        self.x = to_grid_input(x, layer.input_scale, rotation=profile.rotation)
        a_qparams = choose_qparams(self.x, grid=profile.activation, clip_low=clip_low, clip_high=clip_high)
        self.left, self.left_scale = _operand(self.x, *a_qparams, profile.activation, factored=factored)
        w_qparams = layer.weight_quantizer.qparams()
        self.right, self.right_scale = _operand(
            layer.weight.detach().float(), *w_qparams, profile.weight, factored=factored
        )
        # A real zero point is no whole number: the product takes raw codes, and z * (row sum of X) is subtracted after it,
        # as the kernels do. ``right`` is What all the same, for the backward pass.
        self.right_zero = None
        raw = self.right
        if factored and profile.weight.zero_point == "real":
            self.right_zero = w_qparams[1].reshape(-1)
            raw = (self.right + w_qparams[1]).round()
        if layer.phi is not None and layer.phi.active:
            helper = layer.phi.weight().detach()
            helper = helper / w_qparams[0] if factored else helper
            self.right, raw = self.right + helper, raw + helper
        self.right_raw = raw


class _FakeQuantLinear(torch.autograd.Function):
    """Y [M, N] of x [M, K] with the layer's parameters as differentiable inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip_low: Tensor, clip_high: Tensor, *rest: Any) -> Tensor:
        weight, scale, zero_point, phi_left, phi_right, bias, layer = rest
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.save_for_backward(x, clip_low, clip_high, weight, scale, zero_point, phi_left, phi_right)
        ctx.layer, ctx.dtype, ctx.has_bias = layer, dtype, bias is not None
        with torch.autocast(device, enabled=False):
            ops = _Operands(layer, x, clip_low, clip_high)
            y = functional.linear(ops.left.to(dtype), ops.right_raw.to(dtype)).float()
            if ops.right_zero is not None:
                y = y - ops.left.sum(-1, keepdim=True) * ops.right_zero
            if ops.left_scale is not None and ops.right_scale is not None:
                y = (y * ops.left_scale.unsqueeze(-1)) * ops.right_scale
            if bias is not None:
                y = y + bias.float()
            return y.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, clip_low, clip_high, weight, _, _, phi_left, phi_right = ctx.saved_tensors
        layer, profile, dtype = ctx.layer, ctx.layer.profile, ctx.dtype
        with torch.autocast(x.device.type, enabled=False):
            grad_y = grads[0].float()
            ops = _Operands(layer, x, clip_low, clip_high)
            by_row = grad_y if ops.right_scale is None else grad_y * ops.right_scale
            grad_x_hat = (by_row.to(dtype) @ ops.right.to(dtype)).float()
            by_column = grad_y if ops.left_scale is None else grad_y * ops.left_scale.unsqueeze(-1)
            grad_w_eff = (by_column.to(dtype).mT @ ops.left.to(dtype)).float()
            grad_x, grad_low, grad_high = dynamic_fake_quantize_backward(
                grad_x_hat, ops.x, clip_low=clip_low, clip_high=clip_high, grid=profile.activation
            )
            if profile.rotation:
                grad_x = hadamard_transform(grad_x, block_size=profile.rotation)
            if layer.input_scale is not None:
                grad_x = grad_x * layer.input_scale
            grad_weight, grad_scale, grad_zero = layer.weight_quantizer.gradients(grad_w_eff, weight)
            grad_left = grad_right = None
            if phi_left is not None:
                gate = layer.phi.rank_gate
                grad_left = (grad_w_eff @ phi_right.mT) * gate
                grad_right = (phi_left * gate).mT @ grad_w_eff
            grad_bias = grad_y.sum(0) if ctx.has_bias else None
        return (
            grad_x.to(x.dtype), grad_low, grad_high, grad_weight, grad_scale, grad_zero,
            grad_left, grad_right, grad_bias, None,
        )  # fmt: skip
