"""A training method: the full-precision model's prediction under a smooth L1 loss, with every caption kept."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from qvgen.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class Distilled(Method):
    """Learned scales, and no helper.

    Attributes:
        beta: Size of the error from which the loss is linear, > 0.
    """

    beta: float = 0.1
    share_activations: bool = True

    @property
    def needs_teacher(self) -> bool:
        """Always."""
        return True

    def loss(self, prediction: Tensor, *, teacher: Tensor | None, target: Tensor, timestep: Tensor) -> Tensor:
        """See :class:`qvgen.methods.base.Method`."""
        del target, timestep
        assert teacher is not None, "needs_teacher"
        return functional.smooth_l1_loss(prediction.float(), teacher.float(), beta=self.beta)
