"""A quantized Linear of QVGen's release: what its tensors mean, in the type that they are stored in, operation by operation.

    P = 2^b - 1,  g = 1 / sqrt(K P)
    s' = (s - s g) + s g,   z' = (z - z g) + z g        LSQ's scaled gradient, whose forward pass rounds in half precision
    q = clamp(round(w / s' + z'), 0, P),   W = s' (q - z')
    f = 0.95 sigmoid(logit)                             factor on a token's minimum (lower) and maximum (upper), per group

z' is real and free: a row that does not contain 0 has it outside of [0, P]. Float32 arithmetic would flip 1.8 % of the codes
of a bfloat16 checkpoint. What is not taken over is the rounding of W, and of activations, to half precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CLIP = 0.95
"""The constant by which the release multiplies ranges besides the learned factor."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ReleaseLayer:
    """The tensors of one layer, as stored; the LoRA merged into the weight.

    Attributes:
        weight: [N, K].
        bias: [N] or None.
        scale: [N, 1], as stored.
        zero_point: [N, 1], in codes, as stored.
        lower: [50], logits of the factors on the minimum.
        upper: [50], of those on the maximum.
        bits: Bits of a code.
        activation_bits: Bits of an activation's code.
    """

    weight: Tensor
    bias: Tensor | None
    scale: Tensor
    zero_point: Tensor
    lower: Tensor
    upper: Tensor
    bits: int
    activation_bits: int

    @property
    def qmax(self) -> int:
        """Largest code of a weight."""
        return 2**self.bits - 1

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale s' and zero point z' [N, 1] as the forward pass uses them, in the type that they are stored in."""
        gradient_scale = 1.0 / math.sqrt(self.weight.shape[1] * self.qmax)
        scale, zero_point = (
            (value - value * gradient_scale) + value * gradient_scale for value in (self.scale, self.zero_point)
        )
        return scale, zero_point

    def unclamped(self) -> Tensor:
        """Codes [N, K] before they are clamped: whole numbers, of the weight's type."""
        scale, zero_point = self.qparams()
        return torch.round(self.weight / scale + zero_point)

    def codes(self) -> Tensor:
        """Codes uint8 [N, K]."""
        return self.unclamped().clamp(0, self.qmax).to(torch.uint8)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Factors float32 [50] in (0, 0.95) on the minimum and the maximum of a token, by group."""
        return torch.sigmoid(self.lower).float() * CLIP, torch.sigmoid(self.upper).float() * CLIP

    def rounded_weight(self) -> Tensor:
        """W [N, K] as the release computes it: rounded to the type that its tensors are stored in."""
        scale, zero_point = self.qparams()
        return scale * (self.codes().to(scale.dtype) - zero_point)


def merge_lora(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Weight w + B A for down A [r, K] and up B [N, r]; the product is summed in float32 and rounded once."""
    return weight + (up.float() @ down.float()).to(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class WeightCount:
    """Counts of the rows and values of layers under the bits that were given.

    Attributes:
        rows: Rows.
        at_both_ends: Rows that have both code 0 and the largest one.
        zero_point_outside: Rows whose zero point is outside of [0, P]: their range does not contain 0.
        values: Weights.
        clamped: Weights beyond the range of the codes.
        error: Sum of the squared differences of W as the release rounds it and as it is packed.
        energy: Sum of the squares of W.
    """

    rows: int
    at_both_ends: int
    zero_point_outside: int
    values: int
    clamped: int
    error: float
    energy: float

    @classmethod
    def of(cls, layer: ReleaseLayer) -> WeightCount:
        """Count a layer's."""
        unclamped, qmax = layer.unclamped(), layer.qmax
        scale, zero_point = (value.float() for value in layer.qparams())
        codes = unclamped.clamp(0, qmax)
        both = (codes.amin(1) == 0) & (codes.amax(1) == qmax)
        weight = scale * (codes.float() - zero_point)
        return cls(
            rows=len(codes),
            at_both_ends=int(both.sum()),
            zero_point_outside=int(((zero_point < 0) | (zero_point > qmax)).sum()),
            values=codes.numel(),
            clamped=int(((unclamped < 0) | (unclamped > qmax)).sum()),
            error=float((layer.rounded_weight().float() - weight).square().sum(dtype=torch.float64)),
            energy=float(weight.square().sum(dtype=torch.float64)),
        )

    def __add__(self, other: WeightCount) -> WeightCount:
        return WeightCount(**{name: value + getattr(other, name) for name, value in vars(self).items()})
