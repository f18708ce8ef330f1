"""ViCLIP (InternVid, arXiv 2307.06942): features of a video and of a text whose cosine says how well they fit.

    video [N, F, 3, 224, 224] -> patches of 14 x 14 of every frame, plus their place and their frame's time
                              -> one transformer over all patches of all frames and a class token -> 768 features
    text -> 32 tokens of CLIP's vocabulary -> a causal transformer -> the features at the end token

Both are CLIP ViT-L/14's towers (arXiv 2103.00020, 2.4) where attention of the video tower is over space and time together.
Modules have the names of ``ViClip-InternVid-10M-FLT.pth``. Masking of patches is of training alone and left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from qvgen.evaluation.networks.published_tensors import fill_, read_tensors
from qvgen.evaluation.placement import sampling_device


@dataclass(frozen=True, kw_only=True)
class ViclipSizes:
    """The sizes of the published network, and of smaller ones of the same kind.

    Attributes:
        side: Height and width of a frame in pixels.
        patch: Height and width of a patch in pixels.
        frames: Frames of a video.
        vision_width: Channels of the video tower.
        vision_layers: Its blocks.
        vision_heads: Its attention heads.
        text_width: Channels of the text tower.
        text_layers: Its blocks.
        text_heads: Its attention heads.
        outputs: Features of both.
        vocabulary: Tokens; the last one ends a text.
        context: Tokens of a text.
    """

    side: int = 224
    patch: int = 14
    frames: int = 8
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    outputs: int = 768
    vocabulary: int = 49408
    context: int = 32


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, *, causal: bool) -> Tensor:
        batch, length, width = x.shape
        joint = functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = joint.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
        y: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return y


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.c_fc(x)
        y: Tensor = self.c_proj(hidden * torch.sigmoid(1.702 * hidden))  # CLIP's approximation of GELU
        return y


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn, self.mlp = _Attention(width, heads), _Mlp(width)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, *, causal: bool) -> Tensor:
        x = x + self.attn(self.ln_1(x), causal=causal)
        y: Tensor = x + self.mlp(self.ln_2(x))
        return y


class _Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, *, causal: bool) -> Tensor:
        for block in self.resblocks:
            x = block(x, causal=causal)
        return x


class _VideoTower(nn.Module):
    def __init__(self, sizes: ViclipSizes) -> None:
        super().__init__()
        width, patch = sizes.vision_width, sizes.patch
        self.conv1 = nn.Conv3d(3, width, (1, patch, patch), (1, patch, patch), bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((sizes.side // patch) ** 2 + 1, width))
        self.temporal_positional_embedding = nn.Parameter(torch.zeros(1, sizes.frames, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = _Transformer(width, sizes.vision_layers, sizes.vision_heads)
        self.proj = nn.Parameter(torch.zeros(width, sizes.outputs))

    def forward(self, videos: Tensor) -> Tensor:
        x = self.conv1(videos.transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)  # [N, F, patches, width]
        x = x + self.positional_embedding[1:] + self.temporal_positional_embedding.unsqueeze(2)
        first = (self.class_embedding + self.positional_embedding[0]).expand(len(x), 1, -1)
        x = self.transformer(self.ln_pre(torch.cat((first, x.flatten(1, 2)), 1)), causal=False)
        y: Tensor = self.ln_post(x[:, 0]) @ self.proj
        return y


class _TextTower(nn.Module):
    def __init__(self, sizes: ViclipSizes) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding.from_pretrained(torch.zeros(sizes.vocabulary, sizes.text_width))
        self.positional_embedding = nn.Parameter(torch.zeros(sizes.context, sizes.text_width))
        self.transformer = _Transformer(sizes.text_width, sizes.text_layers, sizes.text_heads)
        self.ln_final = nn.LayerNorm(sizes.text_width)
        self.text_projection = nn.Parameter(torch.zeros(sizes.text_width, sizes.outputs))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer(self.token_embedding(tokens) + self.positional_embedding, causal=True)
        ends = tokens.argmax(-1)  # the end token is the largest
        y: Tensor = self.ln_final(x[torch.arange(len(x), device=x.device), ends]) @ self.text_projection
        return y


class Viclip(nn.Module):
    """The network; :meth:`load` gives it weights."""

    def __init__(self, sizes: ViclipSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.vision_encoder, self.text_encoder = _VideoTower(sizes), _TextTower(sizes)
        self.temp = nn.Parameter(torch.zeros(()))  # of the training loss; the checkpoint has it
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, path: Path, *, sizes: ViclipSizes) -> Self:
        """Read a checkpoint of these sizes.

        Raises:
            ValueError: It is damaged, or a tensor is missing, unexpected or of another shape.
        """
        with torch.device("meta"):
            network = cls(sizes)
        fill_(network, read_tensors(path, inside="model"), path=path)
        return network

    @torch.no_grad()
    def video_features(self, videos: Float[Tensor, "N F 3 H W"]) -> Float[Tensor, "N D"]:
        """Features of normalized videos as unit vectors, float32 [N, D]."""
        return functional.normalize(self.vision_encoder(videos), dim=-1)

    @torch.no_grad()
    def text_features(self, tokens: Int[Tensor, "N L"]) -> Float[Tensor, "N D"]:
        """Features of texts as unit vectors, float32 [N, D]; tokens as the vocabulary gives them, zeros behind the end."""
        return functional.normalize(self.text_encoder(tokens), dim=-1)


@cache
def load_viclip(path: Path, sizes: ViclipSizes) -> Viclip:
    """The network of a file, read once, on the device that measures; raises ValueError for another file."""
    return Viclip.load(path, sizes=sizes).to(sampling_device())
