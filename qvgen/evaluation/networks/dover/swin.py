"""Swin over frames (arXiv 2106.13230) with gated position biases (FAST-VQA, arXiv 2207.02595): DOVER's technical branch.

    clip [B, 3, F, H, W] -> 2 x 4 x 4 patches -> 4 stages of blocks; each but the last halves sides, doubles channels
                         -> layer norm over channels [B, C, F/2, H/32, W/32]

A clip is a mosaic of fragments that were cut from a video, as many of them as a window has rows and columns. Attention is
within windows of 8 x 7 x 7 places, and every second block moves the windows by a half; along an axis that is no longer than
a window nothing moves. A score of two places gets a bias by how they lie to each other, mixed of two tables by how far apart
the fragments of the two are:

    d = |row of i's fragment - row of j's| + |column of i's - column of j's|
    bias = d * position + (1 - d) * fragment_position        (as the program has it; the paper has d as 0 or 1)

A stage without a second table takes the first alone. Places that only the move made neighbours get -100. Modules have the
names of the published checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from qvgen.evaluation.networks.tag2text.swin import Halving, Mlp

_APART = -100.0
Box = tuple[int, int, int]
"""Lengths in frames, rows and columns of the map."""


@dataclass(frozen=True, kw_only=True)
class VideoSwinSizes:
    """The sizes of Swin-T over frames, and of smaller ones of the same kind.

    Attributes:
        width: Channels of the first stage.
        blocks: Blocks of each stage.
        heads: Attention heads of each stage.
        window: Frames, rows and columns of a window in places.
        has_gate: Whether a stage has the table across fragments, for each stage.
    """

    width: int = 96
    blocks: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: Box = (8, 7, 7)
    has_gate: tuple[bool, ...] = (True, True, True, False)

    @property
    def outputs(self) -> int:
        """Channels of the last stage."""
        return self.width * 2 ** (len(self.blocks) - 1)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, window: Box, *, has_gate: bool) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        places = math.prod(2 * length - 1 for length in window)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(places, heads))
        self.fragment_position_bias_table = nn.Parameter(torch.zeros(places, heads)) if has_gate else None
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, *, gate: Tensor, apart: Tensor | None) -> Tensor:
        """Windows [B, W, L, C]; ``gate`` and ``apart`` [W, 1, L, L]."""
        batch, windows, length, width = x.shape
        query, key, value = self.qkv(x).view(batch, windows, length, 3, self.heads, -1).permute(3, 0, 1, 4, 2, 5)
        rows = _relative_places(self.window, length, x.device)
        bias = self.relative_position_bias_table[rows].permute(2, 0, 1)
        if self.fragment_position_bias_table is not None:
            bias = gate * bias + (1 - gate) * self.fragment_position_bias_table[rows].permute(2, 0, 1)
        scores = bias if apart is None else bias + apart
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=scores.expand(batch, windows, -1, -1, -1)
        )
        y: Tensor = self.proj(mixed.transpose(2, 3).reshape(batch, windows, length, width))
        return y


def _relative_places(window: Box, length: int, device: torch.device) -> Tensor:
    """The row of the bias table for each pair of the first L places of a window, int64 [L, L]."""
    steps = [torch.arange(size, device=device) for size in window]
    rows = torch.zeros(length, length, dtype=torch.int64, device=device)
    for grid, size in zip(torch.meshgrid(*steps, indexing="ij"), window, strict=True):
        place = grid.flatten()[:length]
        rows = rows * (2 * size - 1) + place[:, None] - place[None, :] + size - 1
    return rows


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, window: Box, *, moves: bool, has_gate: bool) -> None:
        super().__init__()
        self.window, self.moves = window, moves
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = _Attention(width, heads, window, has_gate=has_gate)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, F, H, W, C] whose lengths are multiples of the window's, where they are longer than it."""
        box = x.shape[1:4]
        window = tuple(min(pair) for pair in zip(self.window, box, strict=True))
        half = [size // 2 if self.moves and length > size else 0 for size, length in zip(self.window, box, strict=True)]
        back = [-step for step in half]
        y = self.norm1(x).roll(back, (1, 2, 3))
        apart = _apart(box, window, half, x.device) if any(half) else None
        y = _merged(self.attn(_windows(y, window), gate=_gate(box, window, half, x.device), apart=apart), window, box)
        x = x + y.roll(half, (1, 2, 3))
        z: Tensor = x + self.mlp(self.norm2(x))
        return z


def _windows(x: Tensor, window: Box) -> Tensor:
    """Maps [B, F, H, W, C] as windows [B, number, places, C]."""
    (frames, height, width), (f, h, w) = x.shape[1:4], window
    parts = x.view(len(x), frames // f, f, height // h, h, width // w, w, -1).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return parts.reshape(len(x), -1, f * h * w, x.shape[-1])


def _merged(x: Tensor, window: Box, box: Box) -> Tensor:
    """Windows [B, number, places, C] back as maps [B, F, H, W, C]."""
    counts = [length // size for length, size in zip(box, window, strict=True)]
    parts = x.view(len(x), *counts, *window, -1).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return parts.reshape(len(x), *box, -1)


def _by_axis(rows: list[Tensor], box: Box, window: Box) -> Tensor:
    """The value of each axis at each place, [3, windows, places], from a vector for each axis."""
    grids = torch.stack(torch.meshgrid(*rows, indexing="ij"), -1).view(1, *box, 3)
    return _windows(grids, window)[0].permute(2, 0, 1)


def _gate(box: Box, window: Box, half: list[int], device: torch.device) -> Tensor:
    """The distance of the fragments of two places, float [windows, 1, L, L]; all frames are one fragment's."""
    rows = [torch.zeros(box[0], device=device)]
    for axis in (1, 2):
        fragment = torch.arange(box[axis], device=device) * window[axis] // box[axis]
        rows.append(fragment.roll(-half[axis]).float())
    places = _by_axis(rows, box, window)
    return (places[:, :, :, None] - places[:, :, None, :]).abs().sum(0).unsqueeze(1)


def _apart(box: Box, window: Box, half: list[int], device: torch.device) -> Tensor:
    """Scores [windows, 1, L, L]: -100 between places of a moved window that come from different ends of the map."""
    rows = []
    for length, size, step in zip(box, window, half, strict=True):
        place = torch.arange(length, device=device)
        rows.append((place >= length - step).float() if step and length > size else torch.zeros(length, device=device))
    areas = _by_axis(rows, box, window)
    differ = (areas[:, :, :, None] != areas[:, :, None, :]).any(0)
    return (differ * _APART).unsqueeze(1)


class _Stage(nn.Module):
    def __init__(self, sizes: VideoSwinSizes, stage: int) -> None:
        super().__init__()
        width = sizes.width * 2**stage
        self.blocks = nn.ModuleList(
            _Block(width, sizes.heads[stage], sizes.window, moves=number % 2 == 1, has_gate=sizes.has_gate[stage])
            for number in range(sizes.blocks[stage])
        )
        self.downsample = Halving(width) if stage < len(sizes.blocks) - 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, F, H, W, C]."""
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class _Patches(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv3d(3, width, (2, 4, 4), (2, 4, 4)), nn.LayerNorm(width)

    def forward(self, clips: Tensor) -> Tensor:
        """Maps [B, F, H, W, C] of clips [B, 3, 2F, 4H, 4W]."""
        x: Tensor = self.norm(self.proj(clips).movedim(1, -1))
        return x


class VideoSwin(nn.Module):
    """The network; weights are given by whoever holds it."""

    def __init__(self, sizes: VideoSwinSizes) -> None:
        super().__init__()
        self.patch_embed = _Patches(sizes.width)
        self.layers = nn.ModuleList(_Stage(sizes, stage) for stage in range(len(sizes.blocks)))
        self.norm = nn.LayerNorm(sizes.outputs)

    def forward(self, clips: Float[Tensor, "B 3 F H W"]) -> Float[Tensor, "B C T Y X"]:
        """Features of normalized clips whose lengths the patches and the windows of every stage divide."""
        x = self.patch_embed(clips)
        for stage in self.layers:
            x = stage(x)
        found: Tensor = self.norm(x).movedim(-1, 1)
        return found
