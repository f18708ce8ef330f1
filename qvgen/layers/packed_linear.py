"""A Linear that runs on packed integer codes: what fold makes of a FakeQuantLinear, and what a checkpoint loads into.

The canonical tensors (row-major codes, scales, zero points; kernels/README.md) are the buffers, so the state dict is the
checkpoint. A kernel backend derives its own order of bytes from them once; that copy is in no state dict.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from qvgen.layers.fake_quant_linear import FakeQuantLinear, input_codes, to_grid_input
from qvgen.layers.noise_band import NoiseBand
from qvgen.quant.affine import dequantize
from qvgen.quant.grid import Profile
from qvgen.quant.packing import pack_codes, unpack_codes
from qvgen_kernels import LinearSpec, packed_linear, prepack, resolve_kernel


def linear_spec(profile: Profile, *, in_features: int, out_features: int) -> LinearSpec:
    """The kernels' description of a layer under a profile."""
    weight, activation = profile.weight, profile.activation
    return LinearSpec(
        in_features=in_features,
        out_features=out_features,
        weight_bits=weight.bits,
        weight_zero_point=weight.zero_point,
        weight_group_size=weight.group_size or 0,
        activation_bits=activation.bits,
        activation_zero_point=activation.zero_point,
        activation_group_size=activation.group_size or 0,
        scale_dtype=activation.scale_dtype,
        rotation=profile.rotation,
    )


class PackedLinear(nn.Module):
    """Integer Linear with dynamic activations.

    Args:
        in_features: K.
        out_features: N.
        bias: Whether the layer has one.
        profile: The two grids and the rotation.
        noise_band: Shared with the other layers of the model.
        kernel: Name of a kernel backend, or ``auto``.
        device: Where the empty buffers are made (``meta`` for shapes alone).

    Attributes:
        codes: buffer uint8, first plane of the codes; ``codes_high``: second plane (3 bits) or None.
        weight_scale: buffer float32 [N] or [N, K / group_size].
        weight_zero_point: buffer uint8 (integer) or float32 (real) like the scale; None for symmetric weights.
        bias: Parameter float32 [N], frozen, or None.
        clip_low: buffer float32 [num_bands], factors in (0, 1); None for symmetric activations.
        clip_high: buffer float32 [num_bands].
        input_scale: buffer float32 [K] or None.
        weight_error: |Q(W) - W|^2 / |W|^2 against the master weight that was folded; None if not known.
    """

    codes: Tensor
    codes_high: Tensor | None
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    bias: nn.Parameter | None
    clip_low: Tensor | None
    clip_high: Tensor
    input_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        profile: Profile,
        noise_band: NoiseBand,
        kernel: str = "auto",
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.profile, self.noise_band = profile, noise_band
        self.kernel = kernel
        self.spec = linear_spec(profile, in_features=in_features, out_features=out_features)
        # One row tells how wide the planes are.
        planes = pack_codes(torch.zeros(1, in_features, dtype=torch.uint8), bits=profile.weight.bits)
        groups = profile.weight.num_groups(in_features)
        shape = (out_features, groups) if profile.weight.group_size else (out_features,)
        zero_dtype = torch.float32 if profile.weight.zero_point == "real" else torch.uint8
        tensors: dict[str, Tensor | None] = {
            "codes": torch.zeros(out_features, planes[0].shape[1], dtype=torch.uint8, device=device),
            "codes_high": None,
            "weight_scale": torch.ones(shape, device=device),
            "weight_zero_point": None,
            "clip_low": None,
            "clip_high": torch.ones(noise_band.num_bands, device=device),
            "input_scale": None,
        }
        if len(planes) == 2:
            tensors["codes_high"] = torch.zeros(out_features, planes[1].shape[1], dtype=torch.uint8, device=device)
        if not profile.weight.symmetric:
            tensors["weight_zero_point"] = torch.zeros(shape, dtype=zero_dtype, device=device)
        if not profile.activation.symmetric:
            tensors["clip_low"] = torch.ones(noise_band.num_bands, device=device)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        # A Parameter, though nothing trains it: diffusers asks modules for the dtype of their first parameter.
        empty = torch.zeros(out_features, device=device)
        self.register_parameter("bias", nn.Parameter(empty, requires_grad=False) if bias else None)
        self.weight_error: float | None = None
        self._prepacked: tuple[str, list[Tensor]] | None = None

    def expect_input_scale_(self) -> None:
        """Make room for an input_scale, which :meth:`from_fake_quant` or a checkpoint then fills."""
        self.input_scale = torch.ones(self.in_features, device=self.codes.device)

    @classmethod
    @torch.no_grad()
    def from_fake_quant(cls, layer: FakeQuantLinear, *, kernel: str = "auto") -> Self:
        """Pack the codes that a layer was trained with. Its Phi must be gone.

        Raises:
            ValueError: Phi still has rank.
        """
        if layer.phi is not None and layer.phi.rank:
            raise ValueError(f"Phi still has rank {layer.phi.rank}; train until its decay is over, then fold")
        packed = cls(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            profile=layer.profile,
            noise_band=layer.noise_band,
            kernel=kernel,
            device=layer.weight.device,
        )
        if layer.input_scale is not None:
            packed.expect_input_scale_()
        grid = layer.profile.weight
        codes = layer.weight_quantizer.codes(layer.weight)
        if grid.symmetric:
            codes = (codes.to(torch.int16) + 2 ** (grid.bits - 1)).to(torch.uint8)
        planes = pack_codes(codes, bits=grid.bits)
        scale, zero_point = layer.weight_quantizer.qparams()
        clip_low, clip_high = layer.activation_quantizer.clip_tables()
        values = {
            "codes": planes[0],
            "codes_high": planes[1] if len(planes) == 2 else None,
            "weight_scale": scale.reshape(packed.weight_scale.shape),
            "weight_zero_point": zero_point.reshape(packed.weight_scale.shape),
            "bias": layer.bias,
            "clip_low": clip_low,
            "clip_high": clip_high,
            "input_scale": layer.input_scale,
        }
        for name, tensor in packed.state_dict().items():
            value = values[name]
            assert value is not None
            tensor.copy_(value)
        error = (packed.dequantized_weight() - layer.weight).double().square().sum()
        packed.weight_error = float(error / layer.weight.double().square().sum().clamp(min=1e-30))
        return packed

    @property
    def planes(self) -> tuple[Tensor, ...]:
        """Canonical planes of the codes."""
        return (self.codes,) if self.codes_high is None else (self.codes, self.codes_high)

    @torch.no_grad()
    def integer_codes(self) -> Tensor:
        """Codes as the grid has them: uint8 (asymmetric) or int8 (symmetric), [N, K]."""
        grid = self.profile.weight
        codes = unpack_codes(self.planes, bits=grid.bits, in_features=self.in_features)
        return (codes.to(torch.int16) - 2 ** (grid.bits - 1)).to(torch.int8) if grid.symmetric else codes

    @torch.no_grad()
    def dequantized_weight(self) -> Tensor:
        """float32 [N, K] grid values of the weight, in the layer's own coordinates (rotated, smoothed)."""
        scale = self.weight_scale.reshape(self.out_features, -1)
        zero_point = torch.zeros_like(scale)
        if self.weight_zero_point is not None:
            zero_point = self.weight_zero_point.float().reshape(scale.shape)
        return dequantize(self.integer_codes(), scale=scale, zero_point=zero_point, grid=self.profile.weight)

    def nbytes(self) -> int:
        """Bytes of all tensors that a checkpoint holds of this layer."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values())

    def prepack_(self) -> str:
        """Derive the backend's copy of the weight now; the first call of the layer does it otherwise.

        Returns:
            The name of the backend that runs the layer.

        Raises:
            ValueError: An unknown kernel.
            RuntimeError: A kernel that was asked for by name does not run here.
        """
        name = resolve_kernel(self.kernel, self.spec, device=self.codes.device).name
        weight = prepack(
            self.planes, scale=self.weight_scale, zero_point=self.weight_zero_point, spec=self.spec, kernel=name
        )
        self._prepacked = (name, weight)
        return name

    def row_clips(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Clip factors of every row of an input by its sample's noise band: float32 [M] each."""
        index = self.noise_band.row_index(x).repeat_interleave(math.prod(x.shape[1:-1]))
        return None if self.clip_low is None else self.clip_low[index], self.clip_high[index]

    @torch.no_grad()
    def input_codes(self, x: Tensor) -> Tensor:
        """Codes of an input [B * n, ..., K] as the grid has them, [M, K]; for counting differences."""
        low, high = self.row_clips(x)
        clips = (torch.ones_like(high) if low is None else low).unsqueeze(-1), high.unsqueeze(-1)
        rows = to_grid_input(x.reshape(-1, self.in_features), self.input_scale, rotation=self.profile.rotation)
        return input_codes(rows, clips, self.profile)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x [B * n, ..., K], rows ordered by sample: [B * n, ..., N] in x's dtype."""
        if self._prepacked is None:
            self.prepack_()
        assert self._prepacked is not None
        kernel, weight = self._prepacked
        return packed_linear(
            x,
            weight=weight,
            bias=self.bias,
            clips=self.row_clips(x),
            input_scale=self.input_scale,
            spec=self.spec,
            kernel=kernel,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A scale in half precision would no longer be the one that was trained: only the device may change.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self._prepacked = None
        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._prepacked = None
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        """Sizes for ``print(model)``."""
        return f"{self.in_features} -> {self.out_features}, {self.profile.name} {self.profile.label}"
