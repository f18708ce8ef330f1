"""Distillation of a model into a student of a few steps: each step learns what the teacher does in many small ones.

    v* = (x_a - x_b) / (a - b)          a, b: noise levels of a step of the student and of the next, 0 after the last;
                                        b = 0 with ``model.sampler=lcm``: from each step to the clean sample
    x_b                                 where the teacher's own flow, with guidance, carries x_a in ``substeps`` Euler steps
    loss = mean |v_student(x_a, a) - v*|^2

x_a is a clip of the data with noise of level a, as in piecewise rectified flow (PeRFlow, arXiv 2405.07510), which solves
windows of the teacher's flow from noised data. [ours] PeRFlow trains at all levels within a window, and samples with any
number of steps; here a window has one step, and its beginning alone is trained. The student holds the guidance
(arXiv 2210.03142) and is called once for each step.

Left out: a discriminator, and matching of distributions (DMD). The mean velocity of a window is an average, and such losses
would sharpen the detail that it blurs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from qvgen.config.schema.value_range import Range, check_ranges
from qvgen.methods.base import Method, OdeWindow, Trains


@dataclass(frozen=True, kw_only=True)
class FewStepDistillation(Method):
    """A full-precision student of ``model.timesteps`` from a model of the same sizes, which is its start and its teacher.

    Attributes:
        source: The model that is distilled, as in ``model=NAME``.
        substeps: Steps of the teacher in each of the student's.
        guidance_scale: Classifier-free guidance of the teacher, which the student holds afterwards; 1 is none.
    """

    source: str
    substeps: Annotated[int, Range(">= 1", write="5")]
    guidance_scale: Annotated[float, Range(">= 0", write="2")]
    trains: ClassVar[Trains] = "transformer"
    caption_dropout: Literal[0] = field(default=0, init=False)
    share_activations: Literal[False] = field(default=False, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, section="method")

    @property
    def needs_teacher(self) -> bool:
        """The target is where the teacher arrives."""
        return True

    @property
    def taught_by(self) -> str:
        """The source."""
        return self.source

    @property
    def window(self) -> OdeWindow:
        """A step of the student."""
        return OdeWindow(substeps=self.substeps, guidance_scale=self.guidance_scale)
