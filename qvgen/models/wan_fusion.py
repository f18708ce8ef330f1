"""The packed blocks of Wan: q, k and v are one call, and gates and residuals are part of the layers before them.

diffusers computes ``(hidden.float() + out * gate).type_as(hidden)`` after the self-attention and after the feed-forward, in
three float32 tensors of the size of hidden. Here the layer that makes ``out`` does it while its sums are in registers, with
the same roundings (kernels/README.md, "Tail"), so outputs are equal to the bit. Without packed layers there is nothing to
gain.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformerBlock
from torch import Tensor, nn

from qvgen.layers.block_fusion import BlockFusion, ProjectionMerge
from qvgen.layers.blocked_feed_forward import BlockedFeedForward
from qvgen.layers.packed_linear import PackedLinear


class _WithoutOutput:
    """An attention as its processor sees it, without the output projection."""

    def __init__(self, attention: WanAttention) -> None:
        self.attention, self.to_out = attention, (nn.Identity(), nn.Identity())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attention, name)


class GatedWanAttnProcessor(WanAttnProcessor):  # type: ignore[misc] - diffusers has no types
    """diffusers' processor; gate and residual go into the output projection.

    Args:
        origin: The processor in whose place it stands.
    """

    def __init__(self, origin: WanAttnProcessor) -> None:
        super().__init__()
        self._attention_backend, self._parallel_config = origin._attention_backend, origin._parallel_config

    def __call__(self, attn: WanAttention, *inputs: Tensor | None, gate: Tensor, residual: Tensor) -> Tensor:
        """Residual + gate * attention; gate float32 [B, 1 or n, N], residual [B, n, N]."""
        hidden = super().__call__(_WithoutOutput(attn), *inputs)
        gated: Tensor = attn.to_out[0](hidden, gate=gate, residual=residual)
        return gated


class GatedWanBlock(WanTransformerBlock):  # type: ignore[misc] - diffusers has no types
    """The block around the same modules, so that names in a state dict stay.

    Args:
        block: One for which :func:`can_gate`.
    """

    def __init__(self, block: WanTransformerBlock) -> None:
        nn.Module.__init__(self)
        for name, module in block.named_children():
            setattr(self, name, module)
        self.scale_shift_table = block.scale_shift_table
        self.attn1.set_processor(GatedWanAttnProcessor(self.attn1.processor))
        self.train(block.training)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any) -> Tensor:
        """Apply the block as diffusers does.

        hidden_states are [B, n, N], the text [B, t, N], temb [B, 6, N] or, with a timestep for every token, [B, n, 6, N].
        """
        of_tokens = temb.ndim == 4
        table = (self.scale_shift_table.unsqueeze(0) if of_tokens else self.scale_shift_table) + temb.float()
        parts = [part.squeeze(2) if of_tokens else part for part in table.chunk(6, dim=temb.ndim - 2)]
        shift, scale, gate, ff_shift, ff_scale, ff_gate = parts

        x = (self.norm1(hidden_states.float()) * (1 + scale) + shift).type_as(hidden_states)
        hidden_states = self.attn1(x, None, None, rotary_emb, gate=gate, residual=hidden_states)

        x = self.norm2(hidden_states.float()).type_as(hidden_states)
        hidden_states = hidden_states + self.attn2(x, encoder_hidden_states, None, None)

        x = (self.norm3(hidden_states.float()) * (1 + ff_scale) + ff_shift).type_as(hidden_states)
        gated: Tensor = self.ffn(x, gate=ff_gate, residual=hidden_states)
        return gated


def merge_projections(module: nn.Module) -> ProjectionMerge | None:
    """The merge of a WanAttention: q, k and v, or k and v where it attends to the text; None of any other module.

    Where it attends to an image too, diffusers' switch asks for a merged layer of the image's k and v besides, so nothing
    is merged there.
    """
    if not isinstance(module, WanAttention) or module.add_k_proj is not None:
        return None
    if module.is_cross_attention:
        return ProjectionMerge(parts=("to_k", "to_v"), into="to_kv")
    return ProjectionMerge(parts=("to_q", "to_k", "to_v"), into="to_qkv")


def gate_block(module: nn.Module) -> nn.Module | None:
    """The block that takes the place of a WanTransformerBlock for which :func:`can_gate`; None of any other module."""
    return GatedWanBlock(module) if isinstance(module, WanTransformerBlock) and can_gate(module) else None


def can_gate(block: WanTransformerBlock) -> bool:
    """Whether the layers before both gates are packed, and nothing stands between."""
    attention = block.attn1
    plain = type(attention.processor) is WanAttnProcessor and (attention.to_out[1].p == 0 or not attention.training)
    ends = (attention.to_out[0], block.ffn.net[-1])
    return plain and isinstance(block.ffn, BlockedFeedForward) and all(isinstance(end, PackedLinear) for end in ends)


WAN_FUSION = BlockFusion(merge=merge_projections, gate=gate_block)
"""See :mod:`qvgen.layers.block_fusion`."""
