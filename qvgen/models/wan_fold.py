"""Which Linears of diffusers' Wan transformer read the same input, and where smoothing vectors disappear.

    attn1.to_out, attn2.to_out   <- to_v            attention mixes tokens, not channels: channel j of its output is channel j
                                                    of the values (and of an image's, add_v_proj, where there is one)
    attn2.to_q                   <- norm2           with an affine part of its own (cross_attn_norm)

Where they stay a multiplication before quantization:

    attn1.to_q, to_k, to_v; ffn.net.0.proj   x = norm(h) (1 + scale) + shift, with scale and shift = a table of the block
                                 plus time_proj(t), which all blocks share. x m needs (1 + scale) m = 1 + scale', so
                                 scale' = m scale + m - 1: the table could take the m - 1, but m would have to
                                 multiply time_proj's share too, the same for all blocks. norm has no affine part.
    proj_out                     likewise: its modulation is the time embedding, which time_proj reads too
    attn2.to_k, to_v             the text, which the cross-attention of all blocks reads: one m for 2 x blocks Linears
    ffn.net.2, the embedders     a GELU or SiLU stands before them
"""

from __future__ import annotations

from torch import nn

from qvgen.layers.block_fusion import BlockFusion, register_fusion
from qvgen.layers.smoothing_fold import Producer, SmoothingFold

WAN_SHARED_INPUTS = (
    ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    ("attn2.to_k", "attn2.to_v"),  # the text
    ("attn2.add_k_proj", "attn2.add_v_proj"),  # an image, where the model has one
)
"""See :attr:`qvgen.models.base.VideoDiT.shared_inputs`."""


def _fusion() -> BlockFusion:
    from qvgen.models.wan_fusion import WAN_FUSION  # imports the transformer's classes, which most verbs do without

    return WAN_FUSION


register_fusion("wan", _fusion)


def wan_folds(transformer: nn.Module) -> list[SmoothingFold]:
    """The folds of a WanTransformer3DModel, quantized or not; see :meth:`qvgen.models.base.VideoDiT.smoothing_folds`."""
    folds = []
    for index, block in enumerate(transformer.blocks):  # type: ignore[arg-type,union-attr]
        for attention in ("attn1", "attn2"):
            name = f"blocks.{index}.{attention}"
            has_image = getattr(block.get_submodule(attention), "add_v_proj", None) is not None
            values = [f"{name}.to_v", *([f"{name}.add_v_proj"] if has_image else [])]
            folds.append(
                SmoothingFold(
                    consumers=(f"{name}.to_out.0",), producers=tuple(Producer(module=value) for value in values)
                )
            )
        if getattr(block.norm2, "weight", None) is not None:
            folds.append(
                SmoothingFold(
                    consumers=(f"blocks.{index}.attn2.to_q",), producers=(Producer(module=f"blocks.{index}.norm2"),)
                )
            )
    return folds
