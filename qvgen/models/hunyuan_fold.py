"""Where a smoothing vector m disappears in blocks that HunyuanVideo and HunyuanVideo 1.5 have in common.

A modulation is a Linear of its block, so that rows of its shift take m, and rows of its scale m with m - 1 on the bias
(:mod:`qvgen.layers.smoothing_fold`); the norms of the token refiner are affine.
"""

from __future__ import annotations

from collections.abc import Iterator

from qvgen.layers.smoothing_fold import Producer, SmoothingFold

VIDEO = ("attn.to_q", "attn.to_k", "attn.to_v")
"""Layers of an attention that read the video's tokens, or those of the refiner."""
TEXT = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
"""Layers of an attention that read the text's tokens."""


def behind(linear: str, readers: tuple[str, ...], *, shift: int, scale: int) -> SmoothingFold:
    """The layers behind a modulated norm; ``shift`` and ``scale`` are the first of their rows in the modulation's Linear."""
    rows = Producer(module=linear, start=shift), Producer(module=linear, start=scale, is_added_to_one=True)
    return SmoothingFold(consumers=readers, producers=rows)


def double_folds(block: str, *, width: int) -> Iterator[SmoothingFold]:
    """A block of two streams; rows of its modulations: shift, scale and gate of attention, then of the feed-forward net."""
    for norm, attention, net in (("norm1", VIDEO, "ff"), ("norm1_context", TEXT, "ff_context")):
        readers = tuple(f"{block}.{name}" for name in attention)
        yield behind(f"{block}.{norm}.linear", readers, shift=0, scale=width)
        yield behind(f"{block}.{norm}.linear", (f"{block}.{net}.net.0.proj",), shift=3 * width, scale=4 * width)


def refiner_folds(blocks: int) -> Iterator[SmoothingFold]:
    """The token refiner's blocks, whose norms have affine parts."""
    for index in range(blocks):
        block = f"context_embedder.token_refiner.refiner_blocks.{index}"
        places = (
            (("attn.to_out.0",), "attn.to_v"),  # scales rows of to_v before its own input is smoothed
            (VIDEO, "norm1"),
            (("ff.net.0.proj",), "norm2"),
        )
        for readers, producer in places:
            consumers = tuple(f"{block}.{name}" for name in readers)
            yield SmoothingFold(consumers=consumers, producers=(Producer(module=f"{block}.{producer}"),))
