"""The part that HunyuanVideo and HunyuanVideo 1.5 share.

objective     flow matching with the shift that the model is sampled with (qvgen.models.objectives)
latents       VAE latents times scaling_factor
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar

import numpy as np
from torch import Tensor

from qvgen.models.base import Objective
from qvgen.models.few_step import drawn_objective
from qvgen.models.flow_scheduler import FLOW_SCHEDULER, check_plain_flow
from qvgen.models.guidance import SHIFT, require_number
from qvgen.models.hunyuan_fold import TEXT, VIDEO
from qvgen.models.objectives import FlowMatching
from qvgen.models.pipeline_family import PipelineFamily


@dataclass(kw_only=True, eq=False)
class HunyuanFamily(PipelineFamily):
    """A family whose transformer has a stream for video and one for text.

    Attributes:
        shift: Shift of the noise levels towards noise, in training and sampling; 1 is none. None: the one of the folder's
            scheduler.

    The other keys are those of :class:`qvgen.models.folder_family.FolderFamily`.

    Raises:
        ValueError: Another shift.
    """

    shift: Annotated[float | None, SHIFT] = None

    scheduler_classes: ClassVar[tuple[str, ...]] = (FLOW_SCHEDULER,)
    shared_inputs: ClassVar[Sequence[Sequence[str]]] = (VIDEO, TEXT)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift is not None:
            require_number("shift", self.shift, SHIFT)

    def scheduler(self) -> Any:
        """The folder's scheduler with this family's shift, new; see the base class."""
        scheduler = super().scheduler()
        return scheduler if self.shift is None else scheduler.from_config(scheduler.config, shift=self.shift)

    def _lay_out(self, scheduler: Any, num_steps: int) -> None:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, num_steps + 1)[:-1])

    @cached_property
    def objective(self) -> Objective:
        """Flow matching with the shift that the scheduler samples with, or at a few-step model's timesteps.

        Raises:
            ValueError: the scheduler is of another kind.
        """
        scheduler = self.scheduler()
        check_plain_flow(scheduler, name=self.name, invert_sigmas=False)
        return drawn_objective(FlowMatching(shift=float(scheduler.config["shift"])), self)

    @property
    def compression(self) -> tuple[int, int]:
        """Frames per latent frame (but the first) and pixels per latent pixel of the VAE."""
        config = self._vae_config
        return int(config["temporal_compression_ratio"]), int(config["spatial_compression_ratio"])

    def _normalize(self, latents: Tensor) -> Tensor:
        return latents * self._vae_config["scaling_factor"]

    def _denormalize(self, latents: Tensor) -> Tensor:
        return latents / self._vae_config["scaling_factor"]

    def _from_pipeline(self, latents: Tensor) -> Tensor:
        return latents
