"""The section ``loss``: which noise levels are trained, how much each counts, and what is compared besides predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from qvgen.config.schema.value_range import Range, check_ranges
from qvgen.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Options of the loss, the same for every method that trains a transformer.

    Attributes:
        levels: How noise levels of training samples are drawn: ``uniform``, uniformly over the model's own schedule; or
            ``logit_normal``, so that the logarithm of noise over signal is a normal number and the middle levels come more
            often (Stable Diffusion 3, arXiv 2403.03206). Held-out inputs stay as they are.
        level_mean: Mean of that normal number before the shift; above 0 favours noise.
        level_std: Its standard deviation.
        level_shift: Noise over signal is multiplied by it, as the flow shift of Stable Diffusion 3 does; None: by the model's
            own shift. With ``uniform`` levels it takes the place of ``model.shift`` in training alone, for models of flow
            matching.
        timestep_jitter: Training of a few-step model (``model.timesteps``) draws its timesteps and no others, and moves each
            by a uniform number between minus and plus this, in units of timesteps; less than half of the least distance of
            two. Held-out inputs are not moved.
        weighting: Weight of a sample's loss by its noise level: ``none``, or ``min_snr``, which makes the error that of the
            clean sample times min(signal over noise squared, ``snr_limit``) (arXiv 2303.09556).
        snr_limit: That limit, the paper's gamma.
        feature_weight: Weight of the relative error of the blocks' outputs, |h - h_teacher|^2 / |h_teacher|^2, which is added
            to the loss of a method with a teacher; 0: it is not computed.
        feature_blocks: Numbers of the blocks whose outputs are compared, from 0; None: all of them.
    """

    levels: Literal["uniform", "logit_normal"]
    level_mean: Annotated[float, Range("[-10, 10]", write="0")]
    level_std: Annotated[float, Range("> 0", write="1")]
    level_shift: Annotated[float | None, Range(">= 1", write="3")]
    timestep_jitter: Annotated[float, Range(">= 0", write="5")]
    weighting: Literal["none", "min_snr"]
    snr_limit: Annotated[float, Range("> 0", write="5")]
    feature_weight: Annotated[float, Range(">= 0", write="0.1")]
    feature_blocks: tuple[int, ...] | None

    def __post_init__(self) -> None:
        check_ranges(self, section="loss")
        blocks = self.feature_blocks
        if blocks is not None and (not blocks or min(blocks) < 0 or len(set(blocks)) != len(blocks)):
            shown = ",".join(map(str, blocks))
            raise UserError(
                f"loss.feature_blocks=[{shown}] must be different numbers from 0 on; write for example [0,9]"
            )
        if blocks is not None and not self.feature_weight:
            raise UserError(
                "loss.feature_blocks says nothing with loss.feature_weight=0; write loss.feature_weight=0.1"
            )

    @property
    def draws_as_the_model(self) -> bool:
        """Whether noise levels are those of the model's own objective."""
        return self.levels == "uniform" and self.level_shift is None and not self.timestep_jitter
