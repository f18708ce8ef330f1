"""LSQ and LSQ+ (arXiv 1902.08153, 2004.09576): learned scales and zero points, straight-through rounding, no helper."""

from __future__ import annotations

from dataclasses import dataclass

from qvgen.methods.base import CaptionDropout, Method


@dataclass(frozen=True, kw_only=True)
class LSQ(Method):
    """Quantization-aware training on the data's own loss, as published; ``method=kd`` is the same with a teacher.

    Attributes:
        caption_dropout, share_activations: See :class:`qvgen.methods.base.Method`.
    """

    caption_dropout: CaptionDropout = 0.05
    share_activations: bool = True
