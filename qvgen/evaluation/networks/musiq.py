"""MUSIQ (arXiv 2108.05997): the quality of an image, by a transformer over its patches at three sizes.

    sizes      longer side 224, longer side 384 (bicubic), and as it is; cut into patches of 32 x 32, zeros around
    patch      7 x 7 convolution, pool, one bottleneck (weights standardized) -> 8 x 8 x 256, rows first -> a token
    token      + embedding of its place, hashed to 10 x 10, + embedding of its size; tokens that only fill up are masked
    score      linear of the class token behind the last normalization, 0 to 100 where it was trained on SPAQ

Modules are named as in the published file (musiq_spaq_ckpt-358bb6af.pth of IQA-PyTorch), which is read strictly. Widths and
depth are the file's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from qvgen.evaluation.networks.published_tensors import read_tensors
from qvgen.evaluation.placement import sampling_device

PATCH, GRID, HEADS, STEM = 32, 10, 6, 64
LONGER_SIDES = (224, 384)
_MASKED = -1e3
"""Logit of a pair of tokens one of which only fills up, as published: not minus infinity."""


def _pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros around [B, C, H, W], so that every stride has an output; the odd one goes behind."""
    sizes = []
    for length in (x.shape[-1], x.shape[-2]):
        total = (-(-length // stride) - 1) * stride + kernel - length
        sizes += [total // 2, total - total // 2]
    return functional.pad(x, sizes)


class _StandardizedConv(nn.Conv2d):
    """A convolution whose filters have mean 0 and deviation 1."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return functional.conv2d(_pad_same(x, self.kernel_size[0], self.stride[0]), weight, None, self.stride)


def _conv(inputs: int, outputs: int, size: int, *, stride: int = 1) -> _StandardizedConv:
    return _StandardizedConv(inputs, outputs, size, stride=stride, bias=False)


class _Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = _conv(STEM, STEM, 1), _conv(STEM, STEM, 3), _conv(STEM, 4 * STEM, 1)
        self.gn1, self.gn2 = nn.GroupNorm(32, STEM, eps=1e-4), nn.GroupNorm(32, STEM, eps=1e-4)
        self.gn3, self.gn_proj = nn.GroupNorm(32, 4 * STEM, eps=1e-4), nn.GroupNorm(32, 4 * STEM, eps=1e-4)
        self.conv_proj = _conv(STEM, 4 * STEM, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.gn1(self.conv1(x)).relu()
        y = self.gn2(self.conv2(y)).relu()
        return (self.gn3(self.conv3(y)) + self.gn_proj(self.conv_proj(x))).relu()


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        logits = q @ k.mT * q.shape[-1] ** -0.5
        logits = logits.masked_fill(~(seen[:, None, :, None] & seen[:, None, None, :]), _MASKED)
        y: Tensor = self.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return y


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = _Attention(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), seen)
        y: Tensor = x + self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.norm2(x))))
        return y


class _Table(nn.Module):
    def __init__(self, name: str, *shape: int) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


class _Encoder(nn.Module):
    def __init__(self, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.posembed_input = _Table("position_emb", 1, GRID * GRID, width)
        self.scaleembed_input = _Table("scale_emb", len(LONGER_SIDES) + 1, width)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.transformer = nn.ModuleDict({f"encoderblock_{index}": _Block(width, hidden) for index in range(layers)})

    def forward(self, x: Tensor, places: Tensor, scales: Tensor, seen: Tensor) -> Tensor:
        positions, sizes = self.posembed_input.position_emb, self.scaleembed_input.scale_emb
        x = x + positions[0][places] + sizes[scales]
        x = torch.cat((self.cls.expand(len(x), -1, -1), x), 1)
        seen = torch.cat((seen.new_ones(1), seen)).expand(len(x), -1)
        for block in self.transformer.values():
            x = block(x, seen)
        y: Tensor = self.encoder_norm(x)[:, 0]
        return y


class Musiq(nn.Module):
    """The network.

    Args:
        tensors: Name -> tensor, as published.

    Raises:
        ValueError: They are another network's.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        try:
            width, inputs = tensors["embedding.weight"].shape
            first = "transformer_encoder.transformer.encoderblock_"
            hidden = len(tensors[f"{first}0.mlp.fc1.weight"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"they are no weights of MUSIQ ({error})") from error
        layers = len({name[len(first) :].split(".")[0] for name in tensors if name.startswith(first)})
        self.conv_root, self.gn_root = _conv(3, STEM, 7, stride=2), nn.GroupNorm(32, STEM, eps=1e-6)
        self.block1, self.embedding = _Bottleneck(), nn.Linear(inputs, width)
        self.transformer_encoder = _Encoder(width, hidden, layers)
        self.head = nn.Linear(width, 1)
        try:
            self.load_state_dict({name.removeprefix("module."): value for name, value in tensors.items()}, strict=True)
        except RuntimeError as error:
            raise ValueError(f"they are no weights of MUSIQ ({' '.join(str(error).split())[:160]})") from error
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
        """The scores of images in [0, 1], float32 [B]."""
        images = 2 * images - 1
        factors = [side / max(images.shape[-2:]) for side in LONGER_SIDES]
        sizes = [[round(length * factor) for length in images.shape[-2:]] for factor in factors]
        scaled = [functional.interpolate(images, size=size, mode="bicubic") for size in sizes]
        rows = [
            _patches(image, scale=scale, count=math.ceil(side / PATCH) ** 2)
            for scale, (image, side) in enumerate(zip(scaled, LONGER_SIDES, strict=True))
        ]
        rows.append(_patches(images, scale=len(LONGER_SIDES), count=None))
        patches, places, scales, seen = (
            torch.cat(parts, -1 if parts[0].dim() == 1 else 1) for parts in zip(*rows, strict=True)
        )
        score: Tensor = self.head(self.transformer_encoder(self._tokens(patches), places, scales, seen))
        return score[:, 0]

    def _tokens(self, patches: Tensor) -> Tensor:
        """Patches [B, N, 3 * 32 * 32] -> tokens [B, N, D]."""
        x = patches.reshape(-1, 3, PATCH, PATCH)
        x = self.gn_root(self.conv_root(x)).relu()
        x = self.block1(functional.max_pool2d(_pad_same(x, 3, 2), 3, 2))
        y: Tensor = self.embedding(x.permute(0, 2, 3, 1).reshape(*patches.shape[:2], -1))
        return y


def _patches(image: Tensor, *, scale: int, count: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An image's patches [B, N, 3 * 32 * 32], their places, their scale, and which are none, filled up to ``count``."""
    rows, columns = (-(-length // PATCH) for length in image.shape[-2:])
    found = functional.unfold(_pad_same(image, PATCH, PATCH), PATCH, stride=PATCH).mT
    grid = torch.arange(GRID, device=image.device).float().view(1, 1, -1)
    y, x = (functional.interpolate(grid, size=number, mode="nearest")[0, 0].long() for number in (rows, columns))
    places = (y[:, None] * GRID + x[None]).flatten()
    number = rows * columns
    more = 0 if count is None else count - number
    seen = torch.arange(number + more, device=image.device) < number
    places = functional.pad(places, (0, more))
    scales = torch.where(seen, scale, 0)  # what fills up has the place and scale 0, as published
    return functional.pad(found, (0, 0, 0, more)), places, scales, seen


@cache
def load_musiq(path: Path) -> Musiq:
    """The network of a file, loaded once; raises ValueError for a damaged or another network's file."""
    try:
        return Musiq(read_tensors(path)).to(sampling_device())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
