"""A Linear that trains on the grid it will run on (QVGen, arXiv 2505.11497, Sec. 3).

    Y = Q(X) (Q(W) + (L gamma) R)^T + x D^T U^T + bias

in the layer's own coordinates, X = H (x m) of the model's x (rotation H and smoothing m, where there are any). D and U
are a low-rank branch in floating point that stays (:mod:`qvgen.layers.branch`), where there is one. The product has the
scales outside of it, as the integer kernels do (:mod:`qvgen.layers.fake_quant_product`). (q - z) are whole numbers of at
most 8 bits and a sign: exact in bfloat16 and float32. In float32, and as long as a sum stays below 2^24, the product is exact
too, so that once Phi is gone this layer and the packed one agree bit for bit. Where a scale belongs to a group of columns
it can't leave the sum: both sides are dequantized before the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from qvgen.layers.activation_choice import ActivationQuantizer, activation_quantizer
from qvgen.layers.bit_choice import by_widths, rows_of
from qvgen.layers.branch import BRANCH_DTYPE, BranchGradient, check_kept_rank, input_factors, whole_branch
from qvgen.layers.fake_quant_product import (
    FakeQuantProduct,
    ProductConfig,
    TouchParameters,
    input_codes,
    rotated,
    to_grid_input,
)
from qvgen.layers.noise_band import NoiseBand
from qvgen.layers.weight_adapter import WeightAdapter, merged_weight
from qvgen.lowrank.phi import Phi
from qvgen.quant.clip_start import InputKind
from qvgen.quant.grid import Profile, static_grid
from qvgen.quant.width_table import Widths, WidthTable
from qvgen.quantizers.activation_static import ActivationStatic, whole_zero_point
from qvgen.quantizers.weight_lsq import WeightLSQ


class FakeQuantLinear(nn.Module):
    """Linear with a fake-quantized weight and input, and optionally Phi.

    Args:
        linear: The layer to replace; its weight (rotated if the profile says so) and bias are copied to float32.
        profile: The two grids and the rotation.
        noise_band: Shared with the other layers of the model.
        phi_rank: Rank of Phi; 0 for none.
        phi_keep: Whether Phi stays (:mod:`qvgen.layers.branch`).
        input_kind: How the model's own inputs of the layer are distributed.

    Attributes:
        weight: Parameter float32 [N, K], the master weight (W H under a rotation).
        bias: Parameter float32 [N] or None.
        weight_quantizer: Learned scale and zero point.
        activation_quantizer: Learned clips, or the learned tables of a static grid.
        phi, adapter: The helper, and a change of the master weight that is trained in its place; or None.
        input_scale: buffer float32 [K]: the input is multiplied with it first (smoothing); None: with nothing.
        branch_down, branch_up: buffers bfloat16 [r, K] and [N, r]: the low-rank branch, on the input as it comes; or None.
        width_table: Widths that change over sampling, or None.
        other_weight_quantizers, other_activation_quantizers: By width, for those of the table alone; or None.
        through_zero_point: Whether the gradient takes the path through the zero point of a range taken at run time.

    Raises:
        ValueError: The profile's groups or rotation, or the rank, do not fit the layer.
    """

    bias: nn.Parameter | None
    through_zero_point = True
    input_scale: Tensor | None
    branch_down: Tensor | None
    branch_up: Tensor | None

    def __init__(
        self, linear: nn.Linear, *, profile: Profile, noise_band: NoiseBand, phi_rank: int = 0, phi_keep: bool = False,
        input_kind: InputKind = "gaussian",
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        profile.check_fits(self.in_features)
        self.profile, self.noise_band, self.input_kind = profile, noise_band, input_kind
        weight = linear.weight.detach().float()
        self.weight = nn.Parameter(rotated(weight, profile) if profile.rotation else weight.clone())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().float().clone())
        self.weight_quantizer = self._weight_quantizer(profile.weight.bits)
        self.activation_quantizer = self._activation_quantizer(profile.activation.bits)
        self.width_table: WidthTable | None = None
        self.other_weight_quantizers: nn.ModuleDict | None = None
        self.other_activation_quantizers: nn.ModuleDict | None = None
        for name in ("input_scale", "branch_down", "branch_up"):
            self.register_buffer(name, None)
        sizes = {"out_features": self.out_features, "in_features": self.in_features, "rank": phi_rank}
        self.phi = Phi(**sizes, keep=phi_keep).to(weight.device) if phi_rank else None
        self.adapter: WeightAdapter | None = None

    def _weight_quantizer(self, bits: int) -> WeightLSQ:
        grid = replace(self.profile.weight, bits=bits)
        return WeightLSQ(out_features=self.out_features, in_features=self.in_features, grid=grid).to(self.weight.device)

    def _activation_quantizer(self, bits: int) -> ActivationQuantizer:
        grid = replace(self.profile.activation, bits=bits)
        kind: InputKind = "gaussian" if self.profile.rotation else self.input_kind
        sizes = {"num_bands": self.noise_band.num_bands, "in_features": self.in_features}
        return activation_quantizer(grid, **sizes, kind=kind).to(self.weight.device)

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
        self.weight.copy_(rotated(weight, profile))
        self.declare_(profile=profile, input_scale=input_scale)

    def declare_(self, *, profile: Profile, input_scale: Tensor | None) -> None:
        """Set what :meth:`move_` sets besides the weight, before a state is loaded."""
        self.profile, self.input_scale = profile, input_scale
        self.weight_quantizer.set_bits_(profile.weight.bits)
        self.activation_quantizer = self._activation_quantizer(profile.activation.bits)

    def set_static_(self, *, timesteps: Sequence[float], scale: Tensor, zero_point: Tensor) -> None:
        """Quantize inputs with one scale for all tokens of a sampling step from now on, and nothing taken at run time.

        Args:
            timesteps: Timesteps of the sampler's steps, in [0, 1000], rising; all layers of a model have the same.
            scale: float32 [num_steps], > 0.
            zero_point: float32 [num_steps], in units of codes; not used by symmetric grids.

        Raises:
            ValueError: Another layer has other timesteps.
        """
        self.noise_band.use_timesteps_(timesteps)
        profile = replace(self.profile, activation=static_grid(self.profile.activation))
        self.declare_(profile=profile, input_scale=self.input_scale)
        assert isinstance(self.activation_quantizer, ActivationStatic)
        self.activation_quantizer.start_from_(scale, zero_point)

    def set_width_table_(self, width_table: WidthTable | None) -> None:
        """Change widths over sampling from now on.

        The scales of weight widths that the layer did not have are for a PTQ method to choose; those that it had stay.

        Raises:
            ValueError: The table does not fit the layer's profile or noise bands.
        """
        weight, activation = self.profile.weight.bits, self.profile.activation.bits
        widths: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        if width_table is not None:
            width_table.check_fits(self.profile, num_bands=self.noise_band.num_bands)
            widths = width_table.weight_widths(weight), width_table.activation_widths(activation)
        had = self.weight_quantizers(), self.activation_quantizers()
        self.width_table = width_table
        weights = {str(b): had[0].get(b) or self._weight_quantizer(b) for b in widths[0] if b != weight}
        activations = {str(b): had[1].get(b) or self._activation_quantizer(b) for b in widths[1] if b != activation}
        self.other_weight_quantizers = nn.ModuleDict(weights) if weights else None
        self.other_activation_quantizers = nn.ModuleDict(activations) if activations else None

    def set_branch_(self, down: Tensor | None, up: Tensor | None) -> None:
        """Have a low-rank branch y += (x down^T) up^T, [r, K] and [N, r], rounded to bfloat16; None: no branch.

        The weight is left as it is: what the branch carries is for the caller to take from it.
        """
        # Contiguous, as a checkpoint stores them: BLAS sums other layouts in another order.
        self.branch_down, self.branch_up = (
            None if factor is None else factor.detach().to(self.weight.device, BRANCH_DTYPE).contiguous()
            for factor in (down, up)
        )

    def weight_quantizers(self) -> dict[int, WeightLSQ]:
        """Every weight width's quantizer, the profile's first."""
        others = self.other_weight_quantizers or {}
        return {self.profile.weight.bits: self.weight_quantizer, **{int(bits): q for bits, q in others.items()}}

    def activation_quantizers(self) -> dict[int, ActivationQuantizer]:
        """Every activation width's quantizer, the profile's first."""
        others = self.other_activation_quantizers or {}
        return {self.profile.activation.bits: self.activation_quantizer, **{int(bits): q for bits, q in others.items()}}

    @torch.no_grad()
    def original_weight(self) -> Tensor:
        """The master weight in the model's own coordinates, float32 [N, K]: not rotated, not smoothed."""
        weight = rotated(self.weight.detach().float(), self.profile)
        return weight.clone() if self.input_scale is None else weight * self.input_scale

    def start_phi_(self, *, generator: torch.Generator, target: Tensor | None = None) -> None:
        """Start Phi from what the weight quantizer loses.

        ``target``, float32 [N, K], is what Q(W) + Phi shall be, in the layer's coordinates; None: the master weight.
        """
        if self.phi is not None:
            check_kept_rank(self)
            target = self.weight.detach() if target is None else target
            self.phi.start_from_(target - self.weight_quantizer.fake_quantize(self.weight), generator=generator)

    def quantized_weight(self) -> Tensor:
        """Q(W), float32 [N, K]: no Phi, no gradient."""
        return self.weight_quantizer.fake_quantize(merged_weight(self))

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """W_eff = Q(W) + (L gamma) R, float32 [N, K]; no gradient."""
        quantized = self.quantized_weight()
        return quantized if self.phi is None or not self.phi.active else quantized + self.phi.weight()

    def row_params(self, x: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
        """The two numbers of each row of an input [B * n, ..., K] that its quantization needs, float32 [M, 1] each.

        They are the clip factors of the minimum and the maximum, or the static scale and zero point.
        """
        quantizer = self.activation_quantizers()[bits]
        shape = (x.shape[0], *([1] * (x.ndim - 1)))
        ones = torch.ones(self.noise_band.num_bands, device=x.device)
        tables = (ones if table is None else table for table in quantizer.tables())
        first, second = (self.noise_band.row_values(table, x) for table in tables)
        if isinstance(quantizer, ActivationStatic):
            second = whole_zero_point(second, quantizer.grid)
        first, second = (value.reshape(shape).expand(*x.shape[:-1], 1).reshape(-1, 1) for value in (first, second))
        return first, second

    @torch.no_grad()
    def input_codes(self, x: Tensor) -> Tensor:
        """Codes of an input [B * n, ..., K] at the profile's width, [M, K]; for counting differences."""
        grid = self.profile.activation
        rows = to_grid_input(x.reshape(-1, self.in_features), self.input_scale, profile=self.profile)
        return input_codes(rows, self.row_params(x, bits=grid.bits), grid)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: [B * n, ..., K], rows ordered by sample.

        Returns:
            [B * n, ..., N] in x's dtype, or autocast's.
        """

        def run(part: Tensor, index: Tensor | None, widths: Widths) -> Tensor:
            return self._product(part, rows_of(self.row_params(x, bits=widths[1]), x, index), widths)

        y = by_widths(x, run, width_table=self.width_table, profile=self.profile, noise_band=self.noise_band)
        if self.width_table is None or not y.requires_grad:
            return y
        quantizers = [*self.weight_quantizers().values(), *self.activation_quantizers().values()]
        return TouchParameters.apply(y, *(p for quantizer in quantizers for p in quantizer.parameters()))

    def _product(self, x: Tensor, params: tuple[Tensor, Tensor], widths: Widths) -> Tensor:
        quantizer = self.weight_quantizers()[widths[0]]
        phi = self.phi if self.phi is not None and self.phi.active else None
        kept = None if phi is None else input_factors(self)
        phi = phi if kept is None else None
        config = ProductConfig(
            weight_quantizer=quantizer,
            activation=self.activation_quantizers()[widths[1]].grid,
            profile=self.profile,
            input_scale=self.input_scale,
            phi=phi,
            branch=whole_branch(self, kept),
            through_zero_point=self.through_zero_point,
        )
        y = FakeQuantProduct.apply(
            x.reshape(-1, self.in_features),
            *params,
            merged_weight(self),
            quantizer.scale,
            quantizer.zero_point,
            None if phi is None else phi.left,
            None if phi is None else phi.right,
            self.bias,
            config,
        )
        if kept is not None:
            y = BranchGradient.apply(y, x.reshape(-1, self.in_features), *kept)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes for ``print(model)``."""
        return f"{self.in_features} -> {self.out_features}, {self.profile.name} {self.profile.label}"
