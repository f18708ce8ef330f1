"""ViTDet's backbone (arXiv 2203.16527): a ViT whose blocks see windows, but for a few that see the whole image.

    image [B, 3, H, W] -> patches of 16 x 16, plus their places -> 12 blocks -> [B, 768, H / 16, W / 16]

A window has 14 x 14 places; the map is filled up with zeros to whole windows, and the filling takes part. To q k / sqrt(d) a
score has added the products of q with a vector for the distance in rows and with one for that in columns. For another size of
image than they were learned for, places are interpolated bicubically and distances linearly. There is no last normalization.
Modules have the names of ``grit_b_densecap_objectdet.pth`` below ``backbone.bottom_up``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from qvgen.evaluation.networks.tag2text.swin import Mlp

_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class VitSizes:
    """The sizes of ViT-B in GRiT, and of smaller ones of the same kind.

    Attributes:
        patch: Height and width of a patch in pixels.
        width: Channels.
        layers: Blocks.
        heads: Attention heads.
        window: Height and width of a window in places.
        whole: Numbers of the blocks that see the whole image.
        side: Height and width in places of the images that distances were learned for.
        learned_side: The same of the images that places were learned for, before detection was.
    """

    patch: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    window: int = 14
    whole: tuple[int, ...] = (2, 5, 8, 11)
    side: int = 64
    learned_side: int = 14


def _distances(learned: Tensor, length: int) -> Tensor:
    """Vectors [length, length, D] for each pair of places on an axis, from learned ones [2 L - 1, D]."""
    count = 2 * length - 1
    if len(learned) != count:
        learned = functional.interpolate(learned.T[None], size=count, mode="linear")[0].T
    place = torch.arange(length, device=learned.device)
    return learned[place[:, None] - place[None] + length - 1]


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rel_pos_h, self.rel_pos_w = (nn.Parameter(torch.zeros(2 * side - 1, width // heads)) for _ in "hw")

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, H, W, C]."""
        batch, height, width, channels = x.shape
        query, key, value = self.qkv(x).view(batch, height * width, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        grid = query.unflatten(2, (height, width))
        down = torch.einsum("bnhwc,hkc->bnhwk", grid, _distances(self.rel_pos_h, height))
        across = torch.einsum("bnhwc,wkc->bnhwk", grid, _distances(self.rel_pos_w, width))
        added = (down.unsqueeze(-1) + across.unsqueeze(-2)).flatten(4).flatten(2, 3)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=added)
        y: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, height, width, channels))
        return y


def _in_windows(attention: nn.Module, x: Tensor, window: int) -> Tensor:
    """Attention of maps [B, H, W, C] within windows."""
    height, width, channels = x.shape[1:]
    x = functional.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    rows, columns = x.shape[1] // window, x.shape[2] // window
    parts = x.view(-1, rows, window, columns, window, channels).transpose(2, 3)
    y = attention(parts.reshape(-1, window, window, channels)).view(parts.shape).transpose(2, 3)
    return y.reshape(x.shape)[:, :height, :width]


class _Block(nn.Module):
    def __init__(self, sizes: VitSizes, *, whole: bool) -> None:
        super().__init__()
        self.window = 0 if whole else sizes.window
        self.norm1, self.norm2 = (nn.LayerNorm(sizes.width, eps=_EPS) for _ in range(2))
        self.attn = _Attention(sizes.width, sizes.heads, sizes.side if whole else sizes.window)
        self.mlp = Mlp(sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, H, W, C]."""
        y = self.norm1(x)
        x = x + (_in_windows(self.attn, y, self.window) if self.window else self.attn(y))
        z: Tensor = x + self.mlp(self.norm2(x))
        return z


class _Patches(nn.Module):
    def __init__(self, sizes: VitSizes) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, sizes.width, sizes.patch, stride=sizes.patch)

    def forward(self, images: Tensor) -> Tensor:
        y: Tensor = self.proj(images).permute(0, 2, 3, 1)
        return y


class Vit(nn.Module):
    """The backbone, without weights."""

    def __init__(self, sizes: VitSizes) -> None:
        super().__init__()
        self.learned_side = sizes.learned_side
        self.patch_embed = _Patches(sizes)
        # The first place is that of a class token, which detection does without.
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + sizes.learned_side**2, sizes.width))
        self.blocks = nn.ModuleList(_Block(sizes, whole=number in sizes.whole) for number in range(sizes.layers))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """Features of normalized images whose sides are multiples of the patch."""
        x = self.patch_embed(images)
        places = self.pos_embed[:, 1:].unflatten(1, (self.learned_side, self.learned_side)).permute(0, 3, 1, 2)
        if places.shape[-2:] != x.shape[1:3]:
            places = functional.interpolate(places, size=x.shape[1:3], mode="bicubic", align_corners=False)
        x = x + places.permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        return x.permute(0, 3, 1, 2)
