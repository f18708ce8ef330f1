"""The layers of :mod:`qvgen.models.stdit3.transformer`; their names are those of the published checkpoint's tensors."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional

from qvgen.models.stdit3.configuration import PATCH

BASE = 10000.0
"""Longest period of sinusoids and rotary positions, over 2 pi."""
_SINUSOIDS, _EPS = 256, 1e-6


class STDiT3Block(nn.Module):
    """A spatial block, or a temporal one where it is given rotary positions.

    Args:
        size: C.
        heads: Heads of both attentions.
    """

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size, eps=_EPS, elementwise_affine=False)
        self.attn = SelfAttention(size, heads)
        self.cross_attn = CrossAttention(size, heads)
        self.norm2 = nn.LayerNorm(size, eps=_EPS, elementwise_affine=False)
        self.mlp = FeedForward(size, 4 * size, size)
        self.scale_shift_table = nn.Parameter(torch.randn(6, size) / size**0.5)

    def forward(
        self, x: Tensor, text: Tensor, mask: Tensor | None, modulation: Tensor, rotary: Tensor | None
    ) -> Tensor:
        """Compute a block.

        Args:
            x: [B, T, S, C].
            text: [B, L, C].
            mask: bool [B, 1, 1, L], of tokens that are read.
            modulation: [B, 6, C].
            rotary: float32 [2, T, D / 2], cosine and sine; None: attention is over S.
        """
        parts = (self.scale_shift_table + modulation)[:, :, None, None].unbind(1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts  # [B, 1, 1, C] each
        inner = self.norm1(x) * (1 + scale) + shift
        if rotary is None:
            inner = self.attn(inner.flatten(0, 1), None).view_as(x)
        else:
            inner = inner.transpose(1, 2)
            inner = self.attn(inner.flatten(0, 1), rotary).view_as(inner).transpose(1, 2)
        x = x + gate * inner
        x = x + self.cross_attn(x.flatten(1, 2), text, mask).view_as(x)
        return x + mlp_gate * self.mlp(self.norm2(x) * (1 + mlp_scale) + mlp_shift)


class SelfAttention(nn.Module):
    """Attention of tokens [N, L, C] to each other; ``qkv`` makes queries, keys and values in one product."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_shape = (heads, size // heads)  # by which its product can be one of 8-bit integers
        self.qkv = nn.Linear(size, 3 * size)
        self.q_norm = HeadNorm(size // heads)
        self.k_norm = HeadNorm(size // heads)
        self.proj = nn.Linear(size, size)

    def forward(self, x: Tensor, rotary: Tensor | None) -> Tensor:
        """Attend, with turned queries and keys where rotary positions are given."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = self.q_norm(query), self.k_norm(key)
        if rotary is not None:
            query, key = _turn(query, rotary), _turn(key, rotary)
        out = functional.scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), value)
        return self.proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class HeadNorm(nn.Module):
    """RMSNorm of the D channels of a head, in float32; torch's own takes no weights of another type than its input's."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize [..., D]."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPS)).to(x.dtype) * self.weight


class CrossAttention(nn.Module):
    """Attention of tokens [B, N, C] to the text [B, L, C]; no norms."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_shape = (heads, size // heads)  # by which its product can be one of 8-bit integers
        self.q_linear = nn.Linear(size, size)
        self.kv_linear = nn.Linear(size, 2 * size)
        self.proj = nn.Linear(size, size)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        """Attend to the text's tokens that the mask holds."""
        query = self.q_linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.kv_linear(text).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """Two Linears with a GELU (its tanh form) between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., inputs] to [..., outputs]."""
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))  # type: ignore[no-any-return]


class PatchEmbedder(nn.Module):
    """One convolution over patches, without overlap."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, size, kernel_size=PATCH, stride=PATCH)

    def forward(self, latents: Tensor) -> Tensor:
        """Embed latents [B, C_in, F, h, w], with zeros behind odd heights and widths, as [B, T, S, C]."""
        height, width = latents.shape[3:]
        padded = functional.pad(latents, (0, -width % PATCH[2], 0, -height % PATCH[1]))
        return self.proj(padded).flatten(3).permute(0, 2, 3, 1)  # type: ignore[no-any-return]


class ScalarEmbedder(nn.Module):
    """Sinusoids of a number behind two Linears with a SiLU between them: of timesteps, and of frames per second."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_SINUSOIDS, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed numbers [B] as [B, C]; cosines stand before sines and are computed in float32."""
        waves = get_timestep_embedding(value.float(), _SINUSOIDS, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.mlp(waves.to(dtype))  # type: ignore[no-any-return]


class CaptionEmbedder(nn.Module):
    """The text's way to the blocks' width, and the embedding [L, D] of no caption, which training dropped captions to."""

    def __init__(self, channels: int, size: int, tokens: int) -> None:
        super().__init__()
        self.y_proj = FeedForward(channels, size, size)
        self.register_buffer("y_embedding", torch.randn(tokens, channels) / channels**0.5)


class FinalLayer(nn.Module):
    """Norm, modulation by the time alone, and the product that makes patches."""

    def __init__(self, size: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(size, eps=_EPS, elementwise_affine=False)
        self.linear = nn.Linear(size, outputs)
        self.scale_shift_table = nn.Parameter(torch.randn(2, size) / size**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Make patches of [B, T, S, C] at times [B, C]."""
        shift, scale = (self.scale_shift_table + time[:, None])[:, :, None, None].unbind(1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)  # type: ignore[no-any-return]


class RotaryPositions(nn.Module):
    """Angles of temporal attention: place times frequency, of pairs of neighbouring channels of a head.

    Its frequencies [D / 2] are in the checkpoint and never trained.
    """

    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.register_buffer("freqs", BASE ** (-torch.arange(0, head_size, 2).float() / head_size))

    def forward(self, length: int) -> Tensor:
        """Return cosines and sines of places 0 to ``length`` - 1, float32 [2, length, D / 2]."""
        freqs = self.freqs.float()  # type: ignore[operator]
        angles = torch.outer(torch.arange(length, device=freqs.device).float(), freqs)
        return torch.stack([angles.cos(), angles.sin()])


def _turn(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn pairs of channels (0, 1), (2, 3), ... of [N, heads, L, D] by their angles, in float32 at least."""
    cosine, sine = rotary
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1).flatten(-2)
