"""GRiT's backbone: ViTDet's features as a pyramid of five maps (a simple feature pyramid, arXiv 2203.16527, section 3).

    stride  8    the features through a transposed convolution
    stride 16    the features
    stride 32    the features, the largest of each 2 x 2
                     each of the three -> 1 x 1 convolution, layer norm over channels, 3 x 3 convolution, layer norm
    stride 64    a convolution of stride 2 of the one before
    stride 128   the same, behind a ReLU

Modules have the names of ``grit_b_densecap_objectdet.pth`` below ``backbone``.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from qvgen.evaluation.networks.grit.vit import Vit, VitSizes

STRIDES = (8, 16, 32, 64, 128)
MULTIPLE = 32
"""Images are filled up to sides that are multiples of it."""


class _Coarser(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.p6, self.p7 = (nn.Conv2d(channels, channels, 3, stride=2, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        coarse = self.p6(x)
        return [coarse, self.p7(functional.relu(coarse))]


class Pyramid(nn.Module):
    """The backbone, without weights; ``channels`` are those of the maps."""

    def __init__(self, sizes: VitSizes, *, channels: int) -> None:
        super().__init__()
        self.bottom_up, self.top_block = Vit(sizes), _Coarser(channels)
        self.fpn_stride_16_8 = nn.ConvTranspose2d(sizes.width, sizes.width, 2, stride=2, bias=False)
        for stride in STRIDES[:3]:
            name = f"fpn_stride{stride}"
            self.add_module(f"{name}_conv1", nn.Conv2d(sizes.width, channels, 1, bias=False))
            self.add_module(f"{name}_norm1", nn.LayerNorm(channels))
            self.add_module(f"{name}_conv2", nn.Conv2d(channels, channels, 3, padding=1, bias=False))
            self.add_module(f"{name}_norm2", nn.LayerNorm(channels))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B C h w"]]:
        """Five maps of normalized images, the finest first."""
        features = self.bottom_up(images)
        maps = [
            self._level(x, stride)
            for x, stride in zip(
                (self.fpn_stride_16_8(features), features, functional.max_pool2d(features, 2)), STRIDES[:3], strict=True
            )
        ]
        return [*maps, *self.top_block(maps[-1])]

    def _level(self, x: Tensor, stride: int) -> Tensor:
        for number in (1, 2):
            x = self.get_submodule(f"fpn_stride{stride}_conv{number}")(x)
            norm = self.get_submodule(f"fpn_stride{stride}_norm{number}")
            x = norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x
