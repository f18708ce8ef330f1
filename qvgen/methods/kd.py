"""Distillation of a quantized model: LSQ and LSQ+ (arXiv 1902.08153, 2004.09576) against the full-precision teacher.

    loss = mean |v_student - v_teacher|^2        on the final prediction

It is QVGen (arXiv 2505.11497) without its helper Phi: the paper's first ablation.
"""

from __future__ import annotations

from dataclasses import dataclass

from qvgen.methods.base import CaptionDropout, Method


@dataclass(frozen=True, kw_only=True)
class Distillation(Method):
    """Learned scales and zero points, straight-through rounding, and the teacher's prediction as the target.

    Attributes:
        caption_dropout, share_activations: See :class:`qvgen.methods.base.Method`.
    """

    caption_dropout: CaptionDropout = 0.05
    share_activations: bool = True

    @property
    def needs_teacher(self) -> bool:
        """The target is the teacher's prediction."""
        return True
