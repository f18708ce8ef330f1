"""AMT-S (arXiv 2304.09790): the frame in the middle of two, by flows that all pairs' correlations correct at each size.

    two encoders     a pyramid at 1/2, 1/4, 1/8, 1/16, and features at 1/8 whose products look up correlations both ways
    1/16 -> 1/8      flows to both frames and features of the middle frame
    1/8 -> 1/4 -> 1/2    each decoder doubles the size; an update corrects flows and features by 7 x 7 correlations
    1/2 -> 1         three flows to each frame with masks and remainders; the warped frames are averaged and convolved

The weights are the published file amt-s.pth (its ``state_dict``); modules are named as there, which is read strictly. Only
the time 1/2 is built, which is all that VBench asks for. The whole is in float32 and at the size of the frames; VBench's
program scales frames down where a GPU has little memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from qvgen.evaluation.networks.published_tensors import read_tensors
from qvgen.evaluation.placement import sampling_device

LEVELS, RADIUS, FLOWS, SKIP = 4, 3, 3, 20
CHANNELS = (20, 32, 44, 56)
"""Channels of the pyramid, from 1/2 to 1/16."""
SIDE_MULTIPLE = 16
MIN_SIDE = 128
"""Pixels of the shorter side: the coarsest correlations, at 1/64, need two places."""


def _resize(x: Tensor, factor: float) -> Tensor:
    return functional.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def _grid(like: Tensor) -> Tensor:
    """Column and row of every place, float32 [1, 2, H, W]."""
    height, width = like.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=like.device), torch.arange(width, device=like.device), indexing="ij"
    )
    return torch.stack((x, y)).to(like)[None]


def _sample(image: Tensor, places: Tensor, *, padding: str) -> Tensor:
    """An image [B, C, H, W] at places [B, H2, W2, 2] in pixels."""
    sizes = places.new_tensor([image.shape[-1] - 1, image.shape[-2] - 1])
    return functional.grid_sample(image, 2 * places / sizes - 1, padding_mode=padding, align_corners=True)


def _warp(image: Tensor, flow: Tensor) -> Tensor:
    """An image as its flow [B, 2, H, W] says, the border repeated."""
    return _sample(image, (_grid(image) + flow).permute(0, 2, 3, 1), padding="border")


def _conv(inputs: int, outputs: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.PReLU(outputs))


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        inner = outputs // 4
        self.conv1 = nn.Conv2d(inputs, inner, 1)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1)
        self.conv3 = nn.Conv2d(inner, outputs, 1)
        self.downsample = None
        if stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in (self.conv1, self.conv2, self.conv3):
            y = functional.instance_norm(conv(y)).relu()
        return ((x if self.downsample is None else functional.instance_norm(self.downsample(x))) + y).relu()


class _FeatureEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 32, 7, 2, 3), nn.Conv2d(96, 84, 1)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(_Bottleneck(a, b, stride=stride), _Bottleneck(b, b, stride=1))
            for a, b, stride in ((32, 32, 1), (32, 64, 2), (64, 96, 2))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = functional.instance_norm(self.conv1(x)).relu()
        y: Tensor = self.conv2(self.layer3(self.layer2(self.layer1(x))))
        return y


class _Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for index, (inputs, outputs) in enumerate(zip((3, *CHANNELS), CHANNELS, strict=False), 1):
            self.add_module(f"pyramid{index}", nn.Sequential(_conv(inputs, outputs, stride=2), _conv(outputs, outputs)))

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for stage in self.children():
            x = stage(x)
            found.append(x)
        return found


class _Residual(nn.Module):
    """Five convolutions, of which the second and the fourth see the last ``SKIP`` channels alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv3 = _conv(channels, channels), _conv(channels, channels)
        self.conv2, self.conv4 = _conv(SKIP, SKIP), _conv(SKIP, SKIP)
        self.conv5, self.prelu = nn.Conv2d(channels, channels, 3, 1, 1), nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for (
            whole,
            part,
        ) in ((self.conv1, self.conv2), (self.conv3, self.conv4)):
            y = whole(y)
            y = torch.cat((y[:, :-SKIP], part(y[:, -SKIP:])), 1)
        z: Tensor = self.prelu(x + self.conv5(y))
        return z


class _Decoder(nn.Module):
    """Doubles the size: from features and flows to ``outputs`` channels."""

    def __init__(self, inputs: int, channels: int, outputs: int) -> None:
        super().__init__()
        self.convblock = nn.Sequential(
            _conv(inputs, channels), _Residual(channels), nn.ConvTranspose2d(channels, outputs, 4, 2, 1)
        )

    def forward(self, *parts: Tensor) -> Tensor:
        y: Tensor = self.convblock(torch.cat(parts, 1))
        return y


class _Update(nn.Module):
    """Corrects features and flows at 1/8 by correlations; ``factor`` is how much larger the features are."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.factor, hidden = factor, 76
        self.convc1 = nn.Conv2d(2 * LEVELS * (2 * RADIUS + 1) ** 2, 64, 1)
        self.convf1, self.convf2 = nn.Conv2d(4, 40, 7, padding=3), nn.Conv2d(40, 20, 3, padding=1)
        self.conv = nn.Conv2d(64 + 20, 68, 3, padding=1)
        self.gru, self.feat_head, self.flow_head = (
            nn.Sequential(nn.Conv2d(a, hidden, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(hidden, b, 3, padding=1))
            for a, b in ((68 + 4 + channels, hidden), (hidden, channels), (hidden, 4))
        )

    def forward(self, features: Tensor, flow: Tensor, correlations: Tensor) -> tuple[Tensor, Tensor]:
        small = features if self.factor == 1 else _resize(features, 1 / self.factor)
        c = functional.leaky_relu(self.convc1(correlations), 0.1)
        f = functional.leaky_relu(self.convf2(functional.leaky_relu(self.convf1(flow), 0.1)), 0.1)
        both = functional.leaky_relu(self.conv(torch.cat((c, f), 1)), 0.1)
        hidden = self.gru(torch.cat((both, flow, small), 1))
        change, moved = self.feat_head(hidden), self.flow_head(hidden)
        if self.factor == 1:
            return change, moved
        return _resize(change, self.factor), self.factor * _resize(moved, self.factor)


class _Correlations:
    """Products of all places' features of two frames, [H W, 1, H, W] and three times pooled by 2, in both directions."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        height, width = first.shape[-2:]
        products = first.flatten(2).mT @ second.flatten(2) / first.shape[1] ** 0.5
        self.tables = [table.reshape(height * width, 1, height, width) for table in (products[0], products[0].T)]
        self.size = (height, width)

    def look_up(self, flows: Tensor) -> Tensor:
        """Correlations around where the middle's flows [1, 4, H, W] lead, [1, 2 * LEVELS * 49, H, W]; 0 outside."""
        near = torch.linspace(-RADIUS, RADIUS, 2 * RADIUS + 1, device=flows.device)
        around = torch.stack(torch.meshgrid(near, near, indexing="ij"), -1)
        found = []
        for table, flow in zip(self.tables, (flows[:, 2:], flows[:, :2]), strict=True):
            # From one frame to the other is twice from the middle; the first table looks up the second frame.
            centre = (_grid(flow) + 2 * flow).permute(0, 2, 3, 1).reshape(-1, 1, 1, 2)
            for level in range(LEVELS):
                values = _sample(table, centre / 2**level + around, padding="zeros")
                found.append(values.reshape(*self.size, -1).permute(2, 0, 1))
                table = functional.avg_pool2d(table, 2, 2) if level + 1 < LEVELS else table
        return torch.cat(found)[None]


class Amt(nn.Module):
    """The network.

    Args:
        tensors: Name -> tensor, as published.

    Raises:
        ValueError: They are another network's.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.feat_encoder, self.encoder = _FeatureEncoder(), _Pyramid()
        one, two, three, four = CHANNELS
        self.decoder4 = _Decoder(2 * four + 1, 2 * four, three + 4)
        self.decoder3 = _Decoder(3 * three + 4, 3 * three, two + 4)
        self.decoder2 = _Decoder(3 * two + 4, 3 * two, one + 4)
        self.decoder1 = _Decoder(3 * one + 4, 3 * one, 8 * FLOWS)
        self.update4, self.update3, self.update2 = _Update(three, 1), _Update(two, 2), _Update(one, 4)
        self.comb_block = nn.Sequential(
            nn.Conv2d(3 * FLOWS, 6 * FLOWS, 3, 1, 1), nn.PReLU(6 * FLOWS), nn.Conv2d(6 * FLOWS, 3, 3, 1, 1)
        )
        try:
            self.load_state_dict(dict(tensors), strict=True)
        except RuntimeError as error:
            raise ValueError(f"they are no weights of AMT-S ({' '.join(str(error).split())[:160]})") from error
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, first: Float[Tensor, "1 3 H W"], second: Float[Tensor, "1 3 H W"]) -> Float[Tensor, "1 3 H W"]:
        """The frame in the middle of two, in [0, 1] as they are; sides are multiples of 16, 128 or more."""
        mean = torch.cat((first, second), 2).mean((1, 2, 3), keepdim=True)
        first, second = first - mean, second - mean
        correlations = _Correlations(self.feat_encoder(first), self.feat_encoder(second))
        pyramids = list(zip(self.encoder(first), self.encoder(second), strict=True))
        a, b = pyramids[3]
        out = self.decoder4(a, b, torch.full_like(a[:, :1], 0.5))
        flows, features = out[:, :4], out[:, 4:]
        flows, features = self._corrected(self.update4, flows, features, correlations)
        for place, decoder, update in ((2, self.decoder3, self.update3), (1, self.decoder2, self.update2)):
            a, b = pyramids[place]
            out = decoder(features, _warp(a, flows[:, :2]), _warp(b, flows[:, 2:]), flows)
            flows, features = out[:, :4] + 2 * _resize(flows, 2), out[:, 4:]
            flows, features = self._corrected(update, flows, features, correlations)
        a, b = pyramids[0]
        out = self.decoder1(features, _warp(a, flows[:, :2]), _warp(b, flows[:, 2:]), flows)
        return self._combined(first, second, mean, 2 * _resize(flows, 2), out)

    def _corrected(
        self, update: _Update, flows: Tensor, features: Tensor, correlations: _Correlations
    ) -> tuple[Tensor, Tensor]:
        small = flows if update.factor == 1 else _resize(flows, 1 / update.factor) / update.factor
        change, moved = update(features, small, correlations.look_up(small))
        return flows + moved, features + change

    def _combined(self, first: Tensor, second: Tensor, mean: Tensor, flows: Tensor, out: Tensor) -> Tensor:
        """The middle frame of the last decoder's three flows to each frame, masks and remainders."""
        to_first, to_second, masks, remainders = (
            part[0].unflatten(0, (FLOWS, -1)) for part in out.split((2 * FLOWS, 2 * FLOWS, FLOWS, 3 * FLOWS), 1)
        )
        a = _warp(first.expand(FLOWS, -1, -1, -1), to_first + flows[:, :2])
        b = _warp(second.expand(FLOWS, -1, -1, -1), to_second + flows[:, 2:])
        masks = masks.sigmoid()
        images = masks * a + (1 - masks) * b + mean + remainders
        combined: Tensor = images.mean(0, keepdim=True) + self.comb_block(images.flatten(0, 1)[None])
        return combined.clamp(0, 1)


@cache
def load_amt(path: Path) -> Amt:
    """The network of a file, loaded once; raises ValueError for a damaged or another network's file."""
    try:
        inside = None if path.suffix == ".safetensors" else "state_dict"
        return Amt(read_tensors(path, inside=inside)).to(sampling_device())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
