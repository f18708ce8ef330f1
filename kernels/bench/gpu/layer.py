"""Random packed layers on a device. Codes and inputs are random: speed does not depend on values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qvgen.quant.packing import pack_codes
from qvgen_kernels import LinearSpec, LinearTensors, packed_linear, prepack

__all__ = ["Canonical", "Packed"]


@dataclass
class Canonical:
    """A layer as a checkpoint holds it.

    Attributes:
        spec: Its shape and grids.
        planes: Packed codes.
        scale: float32 [N].
        zero_point: uint8 [N].
    """

    spec: LinearSpec
    planes: tuple[Tensor, ...]
    scale: Tensor
    zero_point: Tensor

    @classmethod
    def random(cls, spec: LinearSpec, *, device: torch.device, seed: int = 0) -> Canonical:
        """Random codes, scales and zero points."""
        generator = torch.Generator(device).manual_seed(seed)
        top, shape = 2**spec.weight_bits, (spec.out_features, spec.in_features)
        codes = torch.randint(0, top, shape, dtype=torch.uint8, device=device, generator=generator)
        scale = torch.rand(spec.out_features, device=device, generator=generator) * 0.01 + 1e-3
        zero = torch.randint(0, top, shape[:1], dtype=torch.uint8, device=device, generator=generator)
        return cls(spec, pack_codes(codes, bits=spec.weight_bits), scale, zero)

    def packed(self, kernel: str) -> Packed:
        """The layer in a kernel's own order."""
        weight = prepack(self.planes, scale=self.scale, zero_point=self.zero_point, spec=self.spec, kernel=kernel)
        return Packed(self.spec, kernel, weight)


@dataclass
class Packed:
    """A layer that a kernel runs.

    Attributes:
        spec: Its shape and grids.
        kernel: The kernel's name.
        weight: What its prepacking returned.
    """

    spec: LinearSpec
    kernel: str
    weight: list[Tensor]

    @property
    def bytes_per_weight(self) -> float:
        """Memory of the prepacked tensors."""
        return sum(tensor.nbytes for tensor in self.weight) / (self.spec.in_features * self.spec.out_features)

    def __call__(self, x: Tensor, **tensors: Tensor) -> Tensor:
        """The outputs of rows [M, K]; ``tensors`` are fields of LinearTensors."""
        given = LinearTensors(**tensors)
        return packed_linear(x, weight=self.weight, tensors=given, spec=self.spec, kernel=self.kernel)
