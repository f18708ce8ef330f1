"""Swin transformer (arXiv 2103.14030): the image encoder of Tag2Text.

    image [B, 3, 384, 384] -> patches of 4 x 4 -> 4 stages of blocks; each but the last halves sides, doubles channels
                           -> layer norm -> the mean of all places, then the places: [B, 1 + 144, 1024]

Attention is within windows of 12 x 12 places, and every second block moves the windows by a half; a block whose map is no
larger than a window moves nothing. Places that only the move made neighbours get -100 added to their score, as the published
network has it. Modules have the names of the published checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

_APART = -100.0


@dataclass(frozen=True, kw_only=True)
class SwinSizes:
    """The sizes of Swin-B at 384 x 384, and of smaller ones of the same kind.

    Attributes:
        side: Height and width of an image in pixels.
        patch: Height and width of a patch in pixels.
        width: Channels of the first stage.
        layers: Blocks of each stage.
        heads: Attention heads of each stage.
        window: Height and width of a window in places.
    """

    side: int = 384
    patch: int = 4
    width: int = 128
    layers: tuple[int, ...] = (2, 2, 18, 2)
    heads: tuple[int, ...] = (4, 8, 16, 32)
    window: int = 12

    @property
    def outputs(self) -> int:
        """Channels of the last stage."""
        return self.width * 2 ** (len(self.layers) - 1)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, apart: Tensor | None) -> Tensor:
        """Windows [B, W, L, C] of W windows an image; ``apart`` [W, 1, L, L] or None."""
        batch, windows, length, width = x.shape
        query, key, value = self.qkv(x).view(batch, windows, length, 3, self.heads, -1).permute(3, 0, 1, 4, 2, 5)
        bias = self.relative_position_bias_table[_relative_places(self.window, x.device)].permute(2, 0, 1)
        scores = bias if apart is None else bias + apart
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=scores.expand(batch, windows, -1, -1, -1)
        )
        y: Tensor = self.proj(mixed.transpose(2, 3).reshape(batch, windows, length, width))
        return y


def _relative_places(window: int, device: torch.device) -> Tensor:
    """The row of the bias table for each pair of places in a window, int64 [L, L]."""
    steps = torch.arange(window, device=device)
    rows, columns = (grid.flatten() for grid in torch.meshgrid(steps, steps, indexing="ij"))
    down, right = (place[:, None] - place[None, :] + window - 1 for place in (rows, columns))
    return down * (2 * window - 1) + right


class Mlp(nn.Module):
    """W2 gelu(W1 x), four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Rows [..., C]."""
        y: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return y


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, *, side: int, window: int, moved: bool) -> None:
        super().__init__()
        self.window = min(window, side)
        self.shift = window // 2 if moved and side > window else 0
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = _Attention(width, heads, self.window), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, H, W, C]."""
        side, shift = x.shape[1], self.shift
        y = self.norm1(x).roll((-shift, -shift), (1, 2))
        apart = _apart(side, self.window, shift, x) if shift else None
        y = _merged(self.attn(_windows(y, self.window), apart), self.window, side)
        x = x + y.roll((shift, shift), (1, 2))
        z: Tensor = x + self.mlp(self.norm2(x))
        return z


def _windows(x: Tensor, window: int) -> Tensor:
    """Maps [B, H, W, C] as windows [B, (H/w)(W/w), w*w, C]."""
    batch, height, width, channels = x.shape
    parts = x.view(batch, height // window, window, width // window, window, channels).transpose(2, 3)
    return parts.reshape(batch, -1, window * window, channels)


def _merged(x: Tensor, window: int, side: int) -> Tensor:
    """Windows [B, W, L, C] back as maps [B, side, side, C]."""
    batch, across = len(x), side // window
    return x.view(batch, across, across, window, window, -1).transpose(2, 3).reshape(batch, side, side, -1)


def _apart(side: int, window: int, shift: int, x: Tensor) -> Tensor:
    """Scores [W, 1, L, L]: -100 between places of a moved window that come from different borders of the map."""
    place = torch.arange(side, device=x.device)
    band = (place >= side - window).long() + (place >= side - shift).long()
    areas = _windows((3 * band[:, None] + band[None, :]).view(1, side, side, 1), window)[0, :, :, 0]
    differ = areas[:, None, :] != areas[:, :, None]
    return (differ * _APART).to(x.dtype).unsqueeze(1)


class Halving(nn.Module):
    """Half the rows and columns, twice the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., H, W, C]."""
        corners = [x[..., row::2, column::2, :] for column in (0, 1) for row in (0, 1)]
        y: Tensor = self.reduction(self.norm(torch.cat(corners, -1)))
        return y


class _Stage(nn.Module):
    def __init__(self, sizes: SwinSizes, stage: int) -> None:
        super().__init__()
        width, side = sizes.width * 2**stage, sizes.side // sizes.patch // 2**stage
        self.blocks = nn.ModuleList(
            _Block(width, sizes.heads[stage], side=side, window=sizes.window, moved=number % 2 == 1)
            for number in range(sizes.layers[stage])
        )
        self.downsample = Halving(width) if stage < len(sizes.layers) - 1 else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class _Patches(nn.Module):
    def __init__(self, sizes: SwinSizes) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, sizes.width, sizes.patch, stride=sizes.patch)
        self.norm = nn.LayerNorm(sizes.width)

    def forward(self, images: Tensor) -> Tensor:
        y: Tensor = self.norm(self.proj(images).permute(0, 2, 3, 1))
        return y


class Swin(nn.Module):
    """The encoder, without weights."""

    def __init__(self, sizes: SwinSizes) -> None:
        super().__init__()
        self.patch_embed = _Patches(sizes)
        self.layers = nn.ModuleList(_Stage(sizes, stage) for stage in range(len(sizes.layers)))
        self.norm = nn.LayerNorm(sizes.outputs)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B L C"]:
        """Features of normalized images: their mean first, then those of all places row by row."""
        x = self.patch_embed(images)
        for stage in self.layers:
            x = stage(x)
        places = self.norm(x).flatten(1, 2)
        return torch.cat((places.mean(1, keepdim=True), places), 1)
