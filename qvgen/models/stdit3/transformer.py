"""STDiT3, the transformer of Open-Sora 1.2: spatial and temporal blocks in turns, which diffusers does not have.

    x [B, T, S, C]    T latent frames of S = H W patches of 1 x 2 x 2; odd sizes are padded at their ends and cut again
    block             x += gate * attention(norm(x) (1 + scale) + shift)     over the S of a frame, or the T of a place
                      x += cross attention(x, text)                          without norm and gate
                      x += gate * mlp(norm(x) (1 + scale) + shift)           norm: LayerNorm without an affine part
    modulation        a table of the block [6, C] plus the output of t_block, which all blocks share
    attention         queries and keys behind an RMSNorm of each head; temporal ones turned by rotary positions
    time              MLP(sinusoids of t) + MLP(sinusoids of the frames per second)
    positions         sinusoids of both axes, the horizontal half first, in steps of round(sqrt(S)) / length / scale with
                      scale = sqrt(height width) / 512: a place in the picture is the same number at any size

Source: the architecture of Open-Sora 1.2 as published in hpcaitech/Open-Sora (opensora/models/stdit/stdit3.py) and the
configuration of hpcai-tech/OpenSora-STDiT-v3. Names of tensors are those of that checkpoint: it loads strictly.

[ours] Timesteps and angles are computed in float32 whatever the weights are; the authors round both to bfloat16 with them.
Height and width are 8 times those of the latents: for 426 pixels, which 8 does not divide, that is 424.

Left out: masks of frames that are given (their image and video conditioning), sequence parallelism, drop path, other
patches, and embedding captions once for all steps (``skip_y_embedder``).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from qvgen.models.stdit3.configuration import PATCH, PIXELS, published_config
from qvgen.models.stdit3.layers import (
    BASE,
    CaptionEmbedder,
    FinalLayer,
    PatchEmbedder,
    RotaryPositions,
    ScalarEmbedder,
    STDiT3Block,
)


class STDiT3(ModelMixin, ConfigMixin, CacheMixin):  # type: ignore[misc]
    """The transformer.

    Args:
        in_channels: Channels of the latents; the output has twice as many, of which the first half is the velocity.
        num_layers: Spatial blocks, and as many temporal ones.
        num_attention_heads: Heads.
        hidden_size: C, a multiple of the heads and of 4.
        caption_channels: Channels of a caption's embedding.
        model_max_length: Tokens of the caption that stands for none (``y_embedder.y_embedding``).
        input_sq_size: Side of a square picture, in pixels, whose positions are counted one by one.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["STDiT3Block"]
    _repeated_blocks: ClassVar[list[str]] = ["STDiT3Block"]
    _keep_in_fp32_modules: ClassVar[list[str]] = ["rope"]

    published_config = staticmethod(published_config)
    """How its authors' config.json says a configuration: exports of full weights have that form."""

    @register_to_config  # type: ignore[misc]
    def __init__(
        self,
        in_channels: int = 4,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        hidden_size: int = 1152,
        caption_channels: int = 4096,
        model_max_length: int = 300,
        input_sq_size: int = 512,
    ) -> None:
        super().__init__()
        self.square = input_sq_size
        heads = num_attention_heads
        self.rope = RotaryPositions(hidden_size // heads)
        self.x_embedder = PatchEmbedder(in_channels, hidden_size)
        self.t_embedder = ScalarEmbedder(hidden_size)
        self.fps_embedder = ScalarEmbedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbedder(caption_channels, hidden_size, model_max_length)
        self.spatial_blocks = nn.ModuleList(STDiT3Block(hidden_size, heads) for _ in range(num_layers))
        self.temporal_blocks = nn.ModuleList(STDiT3Block(hidden_size, heads) for _ in range(num_layers))
        self.final_layer = FinalLayer(hidden_size, math.prod(PATCH) * 2 * in_channels)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        fps: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Predict the velocity from noise to video, and as many channels that sampling does not read.

        Args:
            hidden_states: [B, in_channels, F, h, w], noisy latents.
            timestep: [B] in [0, 1000], 1000 of pure noise.
            encoder_hidden_states: [B, L, caption_channels].
            encoder_attention_mask: [B, L], above 0 at a caption's own tokens; None: all are.
            fps: [B], frames per second; 120 for a picture. None: 24.
            return_dict: Whether the output is wrapped.

        Returns:
            [B, 2 in_channels, F, h, w], in the type of the weights.
        """
        size = hidden_states.shape[2:]
        grid = tuple(-(-length // patch) for length, patch in zip(size, PATCH, strict=True))  # rounded up
        x = self.x_embedder(hidden_states) + self._positions(grid[1:], like=hidden_states)
        rate = torch.full_like(timestep, 24.0) if fps is None else fps
        time = self.t_embedder(timestep, x.dtype) + self.fps_embedder(rate, x.dtype)
        modulation = self.t_block(time).unflatten(-1, (6, -1))
        text = self.y_embedder.y_proj(encoder_hidden_states)
        mask = None if encoder_attention_mask is None else (encoder_attention_mask > 0)[:, None, None]
        rotary = self.rope(grid[0])
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = self._run(spatial, x, text, mask, modulation, None)
            x = self._run(temporal, x, text, mask, modulation, rotary)
        output = _put_together(self.final_layer(x, time), grid=grid, size=size)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _run(self, block: nn.Module, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def _positions(self, grid: tuple[int, ...], *, like: Tensor) -> Tensor:
        """Sinusoids [S, C] of the places of a frame's patches, in the type of latents [B, C_in, F, h, w]."""
        (rows, columns), (height, width) = grid, like.shape[3:]
        step = round(math.sqrt(rows * columns)) * self.square / (PIXELS * math.sqrt(height * width))
        across, down = (
            _axis(length, step / length, channels=self.config.hidden_size // 2, device=like.device)
            for length in (columns, rows)
        )
        places = (across.expand(rows, -1, -1), down[:, None].expand(-1, columns, -1))
        return torch.cat(places, dim=-1).flatten(0, 1).to(like.dtype)


def _axis(length: int, step: float, *, channels: int, device: torch.device) -> Tensor:
    """Sines and cosines of places 0, step, 2 step, ... along one axis, float32 [length, channels]."""
    half = channels // 2
    freqs = BASE ** (-torch.arange(half, device=device).float() / half)
    angles = torch.outer(torch.arange(length, device=device).float() * step, freqs)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _put_together(patches: Tensor, *, grid: tuple[int, ...], size: torch.Size) -> Tensor:
    """Put patches [B, T, S, 2 x 2 x C_out] together as latents [B, C_out, F, h, w]; what padding made is cut off."""
    tiles = patches.unflatten(2, grid[1:]).unflatten(-1, (*PATCH[1:], -1))  # B T H W 2 2 C
    latents = tiles.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
    return latents[..., : size[1], : size[2]]
