"""UMT (arXiv 2303.16058): a ViT-L/16 over 16 frames that recognizes the 400 actions of Kinetics-400.

    video [N, 3, 16, 224, 224] -> patches of 16 x 16 of every frame plus their place and time -> 24 blocks
                               -> the mean over all patches -> layer norm -> 400 logits

Modules have the names of ``l16_ptk710_ftk710_ftk400_f16_res224.pth`` (the model ``vit_large_patch16_224`` with a tubelet of
one frame and mean pooling). Queries and values have a bias, and keys have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from qvgen.evaluation.networks.published_tensors import fill_, read_tensors
from qvgen.evaluation.placement import sampling_device

_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class UmtSizes:
    """The sizes of the published network, and of smaller ones of the same kind.

    Attributes:
        side: Height and width of a frame in pixels.
        patch: Height and width of a patch in pixels.
        frames: Frames of a video.
        width: Channels.
        layers: Blocks.
        heads: Attention heads.
        classes: Actions.
    """

    side: int = 224
    patch: int = 16
    frames: int = 16
    width: int = 1024
    layers: int = 24
    heads: int = 16
    classes: int = 400


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        joint = functional.linear(x, self.qkv.weight, bias)
        query, key, value = joint.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        y: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return y


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return y


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=_EPS), nn.LayerNorm(width, eps=_EPS)
        self.attn, self.mlp = _Attention(width, heads), _Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class _Patches(nn.Module):
    def __init__(self, sizes: UmtSizes) -> None:
        super().__init__()
        kernel = (1, sizes.patch, sizes.patch)
        self.proj = nn.Conv3d(3, sizes.width, kernel, kernel)

    def forward(self, videos: Tensor) -> Tensor:
        y: Tensor = self.proj(videos).flatten(2).mT
        return y


class Umt(nn.Module):
    """The network; :meth:`load` gives it weights."""

    def __init__(self, sizes: UmtSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.patch_embed = _Patches(sizes)
        self.pos_embed = nn.Parameter(torch.zeros(1, sizes.frames * (sizes.side // sizes.patch) ** 2, sizes.width))
        self.blocks = nn.ModuleList(_Block(sizes.width, sizes.heads) for _ in range(sizes.layers))
        self.fc_norm = nn.LayerNorm(sizes.width, eps=_EPS)
        self.head = nn.Linear(sizes.width, sizes.classes)
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, path: Path, *, sizes: UmtSizes) -> Self:
        """Read a checkpoint of these sizes.

        Raises:
            ValueError: It is damaged, or a tensor is missing, unexpected or of another shape.
        """
        with torch.device("meta"):
            network = cls(sizes)
        fill_(network, read_tensors(path), path=path)
        return network

    @torch.no_grad()
    def forward(self, videos: Float[Tensor, "N 3 F H W"]) -> Float[Tensor, "N classes"]:
        """Logits of the actions of normalized videos, float32 [N, classes]."""
        x = self.patch_embed(videos) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(self.fc_norm(x.mean(1)))
        return y


@cache
def load_umt(path: Path, sizes: UmtSizes) -> Umt:
    """The network of a file, read once, on the device that measures; raises ValueError for another file."""
    return Umt.load(path, sizes=sizes).to(sampling_device())
