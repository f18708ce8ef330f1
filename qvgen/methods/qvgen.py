"""QVGen (arXiv 2505.11497): distillation from the full-precision teacher, with Phi that decays to nothing."""

from __future__ import annotations

from dataclasses import dataclass

from qvgen.config.schema.sections import PhiConfig
from qvgen.methods.base import CaptionDropout, Method
from qvgen.methods.phi_decay import PhiDecay, decay_ranks


@dataclass(frozen=True, kw_only=True)
class QVGen(Method):
    """Loss mean |v_student - v_teacher|^2 on the final prediction (Eq. 4); everything in the student is trained.

    The same without the helper is ``method=kd``; the other ablations are keys of ``phi``.

    Attributes:
        caption_dropout, share_activations: See :class:`qvgen.methods.base.Method`.
    """

    caption_dropout: CaptionDropout = 0.05
    share_activations: bool = True

    @property
    def needs_teacher(self) -> bool:
        """The target is the teacher's prediction."""
        return True

    def phi_ranks(self, phi: PhiConfig) -> tuple[int, ...]:
        """The configured ranks."""
        return decay_ranks(phi)

    def schedule(self, phi: PhiConfig, *, num_steps: int) -> PhiDecay:
        """The decay of Phi."""
        return PhiDecay.configured(phi, num_steps=num_steps)
