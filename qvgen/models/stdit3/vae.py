"""The VAE of Open-Sora 1.2: an image VAE frame by frame, and a causal VAE over time behind it, which diffusers does not have.

    spatial   AutoencoderKL of diffusers (SDXL's sizes), 8 x 8 pixels a latent, times 0.18215
    temporal  windows of 17 frames, each for itself: 3 frames of zeros before them, 4 frames a latent, so 5 latents
    then      (z - shift) / scale by channel

    17 frames     1 .. 17                 18 .. 34                  a picture: 1 frame, 1 latent
    latents       1 .. 5                  6 .. 10

The temporal encoder is of convolutions that see no later frame, GroupNorm and SiLU; its decoder doubles frames by halving
channels. Source: hpcaitech/Open-Sora (opensora/models/vae) and hpcai-tech/OpenSora-VAE-v1.2; names of tensors are those of
that checkpoint.

[ours] Latents are the mode of both posteriors, as for every family here; the authors draw from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional

from qvgen.models.stdit3.configuration import FACTOR, HALVES, SCALE, SHIFT, WINDOW, latent_frames

_SPATIAL: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
_TEMPORAL = {"filters": 128, "num_res_blocks": 4, "channel_multipliers": (1, 2, 2, 4), "num_groups": 32}
_SPATIAL_SCALE = 0.18215
_FRAMES_AT_A_TIME = 4
_ELSEWHERE = ("type", "from_pretrained", "subfolder", "cache_dir", "local_files_only", "micro_batch_size")
"""Keys of a published configuration's two parts that are no sizes: where the authors' code took them from."""


class VideoAutoencoderPipeline(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Both VAEs one behind the other; the name is that of its published configuration.

    Args:
        vae_2d: Sizes of the image VAE where they are not SDXL's; keys of diffusers' AutoencoderKL.
        vae_temporal: Sizes of the temporal one likewise: ``filters``, ``num_res_blocks``, ``channel_multipliers``,
            ``num_groups``.
        micro_frame_size: Frames of a window.
        latent_shift: Mean of each channel of the latents.
        latent_scale: Standard deviation of each.
    """

    @register_to_config  # type: ignore[misc]
    def __init__(
        self,
        vae_2d: dict[str, Any] | None = None,
        vae_temporal: dict[str, Any] | None = None,
        micro_frame_size: int = WINDOW,
        latent_shift: Sequence[float] = SHIFT,
        latent_scale: Sequence[float] = SCALE,
    ) -> None:
        super().__init__()
        self.window = micro_frame_size
        self.spatial_vae = nn.ModuleDict({"module": AutoencoderKL(**_SPATIAL | _sizes(vae_2d))})
        self.temporal_vae = TemporalVAE(len(latent_shift), **_TEMPORAL | _sizes(vae_temporal))
        self.register_buffer("shift", torch.tensor(latent_shift).view(1, -1, 1, 1, 1))
        self.register_buffer("scale", torch.tensor(latent_scale).view(1, -1, 1, 1, 1))

    def encode(self, pixels: Tensor) -> Tensor:
        """Turn clips [B, 3, F, H, W] in [-1, 1] into latents [B, C, f, H / 8, W / 8], shifted and scaled."""
        frames = pixels.transpose(1, 2).flatten(0, 1).split(_FRAMES_AT_A_TIME)
        images = torch.cat([self.spatial_vae["module"].encode(part).latent_dist.mode() for part in frames])
        clips = (images * _SPATIAL_SCALE).unflatten(0, (len(pixels), -1)).transpose(1, 2)
        latents = torch.cat([self.temporal_vae.encode(part) for part in clips.split(self.window, dim=2)], dim=2)
        return (latents - self.shift) / self.scale  # type: ignore[no-any-return,operator]

    def decode(self, latents: Tensor, *, num_frames: int) -> Tensor:
        """Turn latents of clips of so many frames into pixels [B, 3, F, H, W] about [-1, 1]."""
        own = latents * self.scale + self.shift  # type: ignore[operator]
        windows = own.split(latent_frames(self.window, window=self.window), dim=2)
        counts = [min(self.window, num_frames - self.window * index) for index in range(len(windows))]
        parts = [self.temporal_vae.decode(part, count) for part, count in zip(windows, counts, strict=True)]
        images = (torch.cat(parts, dim=2) / _SPATIAL_SCALE).transpose(1, 2).flatten(0, 1).split(_FRAMES_AT_A_TIME)
        frames = torch.cat([self.spatial_vae["module"].decode(part, return_dict=False)[0] for part in images])
        return frames.unflatten(0, (len(latents), -1)).transpose(1, 2)


def _sizes(part: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (part or {}).items() if key not in _ELSEWHERE}


class TemporalVAE(nn.Module):
    """The VAE over time of latents [B, C, F, h, w] of an image VAE; its own latents have as many channels.

    Args:
        channels: C.
        filters: Channels of the first level.
        num_res_blocks: Residual blocks of each level.
        channel_multipliers: Channels of the levels, in multiples of the first's.
        num_groups: Groups of the norms.
    """

    def __init__(
        self, channels: int, *, filters: int, num_res_blocks: int, channel_multipliers: Sequence[int], num_groups: int
    ) -> None:
        super().__init__()
        widths = [filters * multiplier for multiplier in channel_multipliers]
        if len(widths) != len(HALVES) + 1:
            raise ValueError(f"channel_multipliers={list(channel_multipliers)} has no {len(HALVES) + 1} levels")
        sizes = {"count": num_res_blocks, "groups": num_groups}
        self.encoder = Encoder(channels, widths, **sizes)
        self.quant_conv = CausalConv(2 * channels, 2 * channels, 1)
        self.post_quant_conv = CausalConv(channels, channels, 1)
        self.decoder = Decoder(channels, widths, **sizes)

    def encode(self, x: Tensor) -> Tensor:
        """The posterior's mean [B, C, f, h, w] of at most one window; zeros stand before what 4 does not divide."""
        padded = functional.pad(x, (0, 0, 0, 0, -x.shape[2] % FACTOR, 0))
        return self.quant_conv(self.encoder(padded)).chunk(2, dim=1)[0]  # type: ignore[no-any-return]

    def decode(self, latents: Tensor, frames: int) -> Tensor:
        """The window's frames; what was made of the zeros before them is cut off."""
        return self.decoder(self.post_quant_conv(latents))[:, :, -frames % FACTOR :]  # type: ignore[no-any-return]


class CausalConv(nn.Module):
    """A convolution over time and space whose outputs see no later frame: zeros stand before the first alone."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, step: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.padding = (*[kernel // 2] * 4, kernel - step, 0)
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride=(step, 1, 1), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, F, h, w] to [B, outputs, F / step, h, w]."""
        return self.conv(functional.pad(x, self.padding))  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """Two convolutions behind norm and SiLU each, and the input beside them; ``conv3`` where the widths differ."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs)
        self.conv1 = CausalConv(inputs, outputs, 3, bias=False)
        self.norm2 = nn.GroupNorm(groups, outputs)
        self.conv2 = CausalConv(outputs, outputs, 3, bias=False)
        self.conv3 = CausalConv(inputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, F, h, w] to [B, outputs, F, h, w]."""
        inner = self.conv1(functional.silu(self.norm1(x)))
        inner = self.conv2(functional.silu(self.norm2(inner)))
        return inner + (x if self.conv3 is None else self.conv3(x))  # type: ignore[no-any-return]


def _level(inputs: int, outputs: int, *, count: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(ResidualBlock(inputs if index == 0 else outputs, outputs, groups) for index in range(count))


def _through(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


class Encoder(nn.Module):
    """Levels of residual blocks with a convolution of step 2 in time between some; mean and logarithmic variance."""

    def __init__(self, channels: int, widths: Sequence[int], *, count: int, groups: int) -> None:
        super().__init__()
        self.conv_in = CausalConv(channels, widths[0], 3, bias=False)
        self.block_res_blocks = nn.ModuleList(
            _level(before, width, count=count, groups=groups) for before, width in pairwise([widths[0], *widths])
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv(width, width, 3, step=2) if halves else nn.Identity()
            for width, halves in zip(widths, HALVES, strict=False)
        )
        self.res_blocks = _level(widths[-1], widths[-1], count=count, groups=groups)
        self.norm1 = nn.GroupNorm(groups, widths[-1])
        self.conv2 = CausalConv(widths[-1], 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, F, h, w] to [B, 2 C, F / 4, h, w]."""
        x = self.conv_in(x)
        for level, between in zip(self.block_res_blocks, [*self.conv_blocks, nn.Identity()], strict=True):
            x = between(_through(level, x))
        return self.conv2(functional.silu(self.norm1(_through(self.res_blocks, x))))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """The encoder's way back: a convolution makes two frames' channels of one where the encoder halved them."""

    def __init__(self, channels: int, widths: Sequence[int], *, count: int, groups: int) -> None:
        super().__init__()
        self.conv1 = CausalConv(channels, widths[-1], 3)
        self.res_blocks = _level(widths[-1], widths[-1], count=count, groups=groups)
        self.block_res_blocks = nn.ModuleList(
            _level(behind, width, count=count, groups=groups) for width, behind in pairwise([*widths, widths[-1]])
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv(width, 2 * width, 3) if halves else nn.Identity()
            for width, halves in zip(widths[1:], HALVES, strict=True)
        )
        self.norm1 = nn.GroupNorm(groups, widths[0])
        self.conv_out = CausalConv(widths[0], channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, f, h, w] to [B, C, 4 f, h, w]."""
        x = _through(self.res_blocks, self.conv1(x))
        for index in reversed(range(len(self.block_res_blocks))):
            x = _through(self.block_res_blocks[index], x)
            if index and HALVES[index - 1]:
                pairs = self.conv_blocks[index - 1](x).unflatten(1, (-1, 2))  # B C 2 F h w
                x = pairs.movedim(2, 3).flatten(2, 3)
        return self.conv_out(functional.silu(self.norm1(x)))  # type: ignore[no-any-return]
