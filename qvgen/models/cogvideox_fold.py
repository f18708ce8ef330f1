"""Which Linears of diffusers' CogVideoX transformer read the same input, and where smoothing vectors disappear.

    x = norm(h) (1 + scale) + shift, for video and text tokens, with shift, scale, gate, enc_shift, enc_scale, enc_gate =
    linear(silu(t)) of each block's own: x m = (m norm(h)) (1 + scale) + m shift. The norm's affine part takes m, and so do
    the rows of linear that make the two shifts.

    attn1.to_q, to_k, to_v   <- norm1      one m for the three, as they read the same x
    ff.net.0.proj            <- norm2
    attn1.to_out             <- to_v       attention mixes tokens, not channels
    proj_out                 <- norm_out   linear makes shift and scale

Where they stay a multiplication before quantization: ff.net.2 and the time embedding (behind a GELU or SiLU), the Linears of
the modulations (behind a SiLU), the text projection and the patch embedding (nothing stands before them).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from qvgen.layers.block_fusion import BlockFusion, register_fusion
from qvgen.layers.smoothing_fold import Producer, SmoothingFold

_QUERIES = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
COGVIDEOX_SHARED_INPUTS = (_QUERIES,)
"""See :attr:`qvgen.models.base.VideoDiT.shared_inputs`."""


def _fusion() -> BlockFusion:
    from qvgen.models.cogvideox_fusion import (
        COGVIDEOX_FUSION,
    )  # imports the transformer's classes, which most verbs do without

    return COGVIDEOX_FUSION


register_fusion("cogvideox", _fusion)


def cogvideox_folds(transformer: nn.Module) -> list[SmoothingFold]:
    """The folds of a CogVideoXTransformer3DModel; see :meth:`qvgen.models.base.VideoDiT.smoothing_folds`.

    A model without affine norms has those behind its values alone.
    """
    model: Any = transformer
    folds = []
    for index, block in enumerate(model.transformer_blocks):
        name = f"transformer_blocks.{index}"
        attention = f"{name}.attn1"
        folds.append(
            SmoothingFold(consumers=(f"{attention}.to_out.0",), producers=(Producer(module=f"{attention}.to_v"),))
        )
        queries = tuple(f"{name}.{query}" for query in _QUERIES)
        folds += _behind_norm(block.norm1, f"{name}.norm1", consumers=queries, shifts=(0, 3))
        folds += _behind_norm(block.norm2, f"{name}.norm2", consumers=(f"{name}.ff.net.0.proj",), shifts=(0, 3))
    return folds + _behind_norm(model.norm_out, "norm_out", consumers=("proj_out",), shifts=(0,))


def _behind_norm(norm: Any, name: str, *, consumers: tuple[str, ...], shifts: tuple[int, ...]) -> list[SmoothingFold]:
    """The layers that read a modulated norm; ``shifts`` are the places of shifts among the chunks of its Linear's output."""
    if norm.norm.weight is None:
        return []
    width = norm.norm.weight.numel()
    rows = tuple(Producer(module=f"{name}.linear", start=width * chunk) for chunk in shifts)
    return [SmoothingFold(consumers=consumers, producers=(Producer(module=f"{name}.norm"), *rows))]
