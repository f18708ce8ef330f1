"""The packed blocks of CogVideoX: q, k and v are one call; off the CPU modulations, gates and residuals are part of layers.

Text and video go through attention and feed-forward as one sequence, but each has its own modulation, gate and residual. So
the sequence is joined once, behind the norm; its modulation is given to the layer with the row that each token takes; and the
last layers are called for the text and for the video. A row's result depends on no other row: outputs are equal to the bit.
Gates are in the model's type. On a CPU they cost torch as little as they would cost the kernel (docs/log.md), so there the
block is diffusers' own.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import CogVideoXLayerNormZero
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor, nn
from torch.nn import functional

from qvgen.layers.block_fusion import BlockFusion, ProjectionMerge, gains_by_fusing, under_autocast
from qvgen.layers.blocked_feed_forward import BlockedFeedForward
from qvgen.layers.layer_input import LayerInput, modulated, normed
from qvgen.layers.packed_linear import PackedLinear

Rotary = tuple[Tensor, Tensor] | None


class Joined:
    """Text and video as one sequence, and what its layers do with it.

    Args:
        norm: The adaptive norm of both.
        hidden: Video, [B, n, K].
        text: Text, [B, t, K].
        temb: [B, E].
        fused: Whether the norm is one of the steps of the layers.

    Attributes:
        x: [B, t + n, K], normed unless that is one of the steps.
        given: The steps.
        gates: Gates of the text and of the video, [B, 1, N].
    """

    def __init__(
        self, norm: CogVideoXLayerNormZero, hidden: Tensor, text: Tensor, temb: Tensor, *, fused: bool = False
    ) -> None:
        shift, scale, gate, text_shift, text_scale, text_gate = norm.linear(norm.silu(temb)).chunk(6, dim=1)
        self.x = torch.cat([text, hidden] if fused else [norm.norm(text), norm.norm(hidden)], dim=1)
        gain, shift = torch.stack([1 + text_scale, 1 + scale], dim=1), torch.stack([text_shift, shift], dim=1)
        samples, tokens = self.x.shape[:2]
        is_video = torch.arange(tokens, dtype=torch.int32, device=temb.device) >= text.shape[1]
        first = 2 * torch.arange(samples, dtype=torch.int32, device=temb.device)
        given = normed(norm.norm, hidden.dtype, gain, shift) if fused else modulated(hidden.dtype, gain, shift)
        self.given = given._replace(row=first.unsqueeze(1) + is_video.to(torch.int32))
        self.gates = (text_gate.unsqueeze(1), gate.unsqueeze(1))


class JoinedCogVideoXAttnProcessor(FusedCogVideoXAttnProcessor2_0):  # type: ignore[misc] - diffusers has no types
    """diffusers' processor, and another way for a sequence that is joined already."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary = None,
        joined: Joined | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention as diffusers' processor gives it; with ``joined``: residual + gate * attention of video and text.

        ``hidden_states`` [B, n, N] and ``encoder_hidden_states`` [B, t, N] are the residuals then. (An attention passes on
        what is named here and nothing else.)
        """
        if joined is None:
            plain: tuple[Tensor, Tensor] = super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return plain
        text = encoder_hidden_states.shape[1]
        found = _attended(attn, joined, text=text, rotary=image_rotary_emb)
        last, (text_gate, gate) = attn.to_out[0], joined.gates
        return (
            last(found[:, text:], gate=gate, residual=hidden_states, given=_AS_IT_IS),
            last(found[:, :text], gate=text_gate, residual=encoder_hidden_states, given=_AS_IT_IS),
        )


_AS_IT_IS = LayerInput()


def _attended(attn: Attention, joined: Joined, *, text: int, rotary: Rotary) -> Tensor:
    """The attention of a joined sequence before the output projection, [B, t + n, K]; diffusers' operators in their order."""
    qkv = attn.to_qkv(joined.x, given=joined.given)
    query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    query = query if attn.norm_q is None else attn.norm_q(query)
    key = key if attn.norm_k is None else attn.norm_k(key)
    if rotary is not None:
        query[:, :, text:] = apply_rotary_emb(query[:, :, text:], rotary)
        key[:, :, text:] = apply_rotary_emb(key[:, :, text:], rotary)
    found = functional.scaled_dot_product_attention(query, key, value, dropout_p=0.0, is_causal=False)
    return found.transpose(1, 2).flatten(2)


class GatedCogVideoXBlock(CogVideoXBlock):  # type: ignore[misc] - diffusers has no types
    """The block around the same modules, so that names in a state dict stay.

    Args:
        block: One for which :func:`can_gate`.

    Attributes:
        fused_norms: Its norms are part of the layers behind them too, which changes last bits of theirs.
    """

    fused_norms = False

    def __init__(self, block: CogVideoXBlock) -> None:
        nn.Module.__init__(self)
        for name, module in block.named_children():
            setattr(self, name, module)
        self.attn1.set_processor(JoinedCogVideoXAttnProcessor())
        self.train(block.training)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Apply the block as diffusers does: video [B, n, N] and text [B, t, N], temb [B, K]."""
        fuses = self.fused_norms or gains_by_fusing(hidden_states)
        if attention_kwargs or under_autocast(hidden_states) or not fuses:
            plain: tuple[Tensor, Tensor] = super().forward(
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs
            )
            return plain
        hidden, text = hidden_states, encoder_hidden_states
        joined = Joined(self.norm1, hidden, text, temb, fused=self.fused_norms)
        hidden, text = self.attn1(hidden, encoder_hidden_states=text, image_rotary_emb=image_rotary_emb, joined=joined)
        joined, count = Joined(self.norm2, hidden, text, temb, fused=self.fused_norms), text.shape[1]
        wide, (text_gate, gate) = self.ff.widen(joined.x, joined.given), joined.gates
        return (
            self.ff.narrow(wide[:, count:], gate=gate, residual=hidden),
            self.ff.narrow(wide[:, :count], gate=text_gate, residual=text),
        )


def merge_projections(module: nn.Module) -> ProjectionMerge | None:
    """The merge of an attention that has the processor of CogVideoX; None of any other module."""
    if not isinstance(module, Attention) or not isinstance(module.processor, CogVideoXAttnProcessor2_0):
        return None
    return ProjectionMerge(parts=("to_q", "to_k", "to_v"), into="to_qkv", processor=FusedCogVideoXAttnProcessor2_0())


def gate_block(module: nn.Module) -> nn.Module | None:
    """The block that takes the place of a CogVideoXBlock for which :func:`can_gate`; None of any other module."""
    return GatedCogVideoXBlock(module) if type(module) is CogVideoXBlock and can_gate(module) else None


def can_gate(block: CogVideoXBlock) -> bool:
    """Whether q, k and v are one packed layer, the layers before both gates are packed, and nothing stands between."""
    attention = block.attn1
    if type(attention.processor) is not FusedCogVideoXAttnProcessor2_0 or attention.is_cross_attention:
        return False
    nothing_after = attention.to_out[1].p == 0 or not attention.training
    packed = isinstance(attention.to_out[0], PackedLinear)
    fused = isinstance(block.ff, BlockedFeedForward) and block.ff.is_fused
    norms = all(type(norm) is CogVideoXLayerNormZero for norm in (block.norm1, block.norm2))
    return nothing_after and packed and fused and norms


COGVIDEOX_FUSION = BlockFusion(merge=merge_projections, gate=gate_block)
"""See :mod:`qvgen.layers.block_fusion`."""
