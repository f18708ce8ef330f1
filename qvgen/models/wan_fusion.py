"""The packed blocks of Wan: q, k and v are one call; modulations, gates and residuals are part of the layers around them.

diffusers computes ``(norm(hidden.float()) * (1 + scale) + shift).type_as(hidden)`` before the self-attention and the
feed-forward, and ``(hidden.float() + out * gate).type_as(hidden)`` after them, each in several float32 tensors of the size of
hidden. Here the layer that reads the norm's float32 output modulates it while it quantizes, and the layer that makes ``out``
adds it while its sums are in registers, with the same roundings (kernels/README.md, "Input steps" and "Tail"), so outputs
are equal to the bit. Without packed layers there is nothing to gain.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformerBlock
from torch import Tensor, nn

from qvgen.layers.block_fusion import BlockFusion, ProjectionMerge, gains_by_fusing
from qvgen.layers.blocked_feed_forward import BlockedFeedForward
from qvgen.layers.layer_input import LayerInput, enter, modulated, normed
from qvgen.layers.packed_linear import PackedLinear


class _AttentionView:
    """An attention as its processor sees it: without the output projection, and with steps before one of its first layers."""

    def __init__(self, attention: WanAttention, **steps: LayerInput) -> None:
        self.attention, self.to_out = attention, (nn.Identity(), nn.Identity())
        for name, given in steps.items():
            setattr(self, name, partial(enter, getattr(attention, name), given=given))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attention, name)


class GatedWanAttnProcessor(WanAttnProcessor):  # type: ignore[misc] - diffusers has no types
    """diffusers' processor; steps go into the first projections, gate and residual into the output projection.

    Args:
        origin: The processor in whose place it stands.
    """

    def __init__(self, origin: WanAttnProcessor) -> None:
        super().__init__()
        self._attention_backend, self._parallel_config = origin._attention_backend, origin._parallel_config

    def __call__(
        self,
        attn: WanAttention,
        hidden: Tensor,
        *inputs: Any,
        given: LayerInput | None = None,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Residual + gate * attention; gate float32 [B, 1 or n, N], residual [B, n, N]. Without a residual as diffusers'."""
        if residual is None or given is None:
            plain: Tensor = super().__call__(attn, hidden, *inputs)
            return plain
        if attn.is_cross_attention:
            view = _AttentionView(attn, to_q=given)
        elif attn.fused_projections:
            view = _AttentionView(attn, to_qkv=given)
        else:  # three layers read it: once is enough
            hidden, view = given.apply(hidden), _AttentionView(attn)
        gated: Tensor = attn.to_out[0](super().__call__(view, hidden, *inputs), gate=gate, residual=residual)
        return gated


class GatedWanBlock(WanTransformerBlock):  # type: ignore[misc] - diffusers has no types
    """The block around the same modules, so that names in a state dict stay.

    Args:
        block: One for which :func:`can_gate`.

    Attributes:
        fused_norms: Its norms are part of the layers behind them too, which changes last bits of theirs.
    """

    fused_norms = False

    def __init__(self, block: WanTransformerBlock) -> None:
        nn.Module.__init__(self)
        for name, module in block.named_children():
            setattr(self, name, module)
        self.scale_shift_table = block.scale_shift_table
        self._adds_to_text = _ends_packed(self.attn2)
        for attention in (self.attn1, *([self.attn2] if self._adds_to_text else [])):
            attention.set_processor(GatedWanAttnProcessor(attention.processor))
        self.train(block.training)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any) -> Tensor:
        """Apply the block as diffusers does.

        hidden_states are [B, n, N], the text [B, t, N], temb [B, 6, N] or, with a timestep for every token, [B, n, 6, N].
        """
        of_tokens = temb.ndim == 4
        table = (self.scale_shift_table.unsqueeze(0) if of_tokens else self.scale_shift_table) + temb.float()
        parts = [part.squeeze(2) if of_tokens else part for part in table.chunk(6, dim=temb.ndim - 2)]
        shift, scale, gate, ff_shift, ff_scale, ff_gate = parts
        x, given = self._entered(self.norm1, hidden_states, 1 + scale, shift)
        hidden_states = self.attn1(x, None, None, rotary_emb, given=given, gate=gate, residual=hidden_states)

        x, given = self._entered(self.norm2, hidden_states)
        if self._adds_to_text and (self.fused_norms or gains_by_fusing(hidden_states)):
            hidden_states = self.attn2(x, encoder_hidden_states, None, None, given=given, residual=hidden_states)
        else:
            hidden_states = hidden_states + self.attn2(given.apply(x), encoder_hidden_states, None, None)

        x, given = self._entered(self.norm3, hidden_states, 1 + ff_scale, ff_shift)
        gated: Tensor = self.ffn(x, given=given, gate=ff_gate, residual=hidden_states)
        return gated

    def _entered(
        self, norm: nn.Module, hidden: Tensor, gain: Tensor | None = None, shift: Tensor | None = None
    ) -> tuple[Tensor, LayerInput]:
        """A layer's input and the steps before it, together ``(norm(hidden.float()) * gain + shift).type_as(hidden)``."""
        if self.fused_norms and isinstance(norm, nn.LayerNorm):
            return hidden, normed(norm, hidden.dtype, gain, shift)
        return norm(hidden.float()), modulated(hidden.dtype, gain, shift)


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
    is_own = type(block) is WanTransformerBlock and isinstance(block.ffn, BlockedFeedForward)
    return is_own and _ends_packed(block.attn1) and isinstance(block.ffn.net[-1], PackedLinear)


def _ends_packed(attention: WanAttention) -> bool:
    """Whether an attention of diffusers' own processor ends in a packed layer and nothing else."""
    nothing_after = attention.to_out[1].p == 0 or not attention.training
    own = type(attention.processor) is WanAttnProcessor
    return own and nothing_after and isinstance(attention.to_out[0], PackedLinear)


WAN_FUSION = BlockFusion(merge=merge_projections, gate=gate_block)
"""See :mod:`qvgen.layers.block_fusion`."""
