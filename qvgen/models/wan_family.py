"""The part that families over diffusers' Wan classes share: flow matching, calls of the transformer, latents' statistics.

    transformer   WanTransformer3DModel; latents as [B, C, F, H, W], text by cross-attention
    objective     flow matching with the shift that the model is sampled with (qvgen.models.objectives)
    latents       (z - latents_mean) / latents_std per channel, of the VAE's configuration

The text encoder is a family's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qvgen.layers.smoothing_fold import SmoothingFold
from qvgen.models.base import Objective
from qvgen.models.few_step import drawn_objective
from qvgen.models.guidance import SHIFT, require_number
from qvgen.models.objectives import NUM_TRAIN_TIMESTEPS, FlowMatching
from qvgen.models.original.names import WAN_ORIGINAL_NAMES, OriginalNames
from qvgen.models.pipeline_family import PipelineFamily
from qvgen.models.wan_fold import WAN_SHARED_INPUTS, wan_folds

_SHIFT_KEYS = {"UniPCMultistepScheduler": "flow_shift", "FlowMatchEulerDiscreteScheduler": "shift"}


@dataclass(kw_only=True, eq=False)
class WanFamily(PipelineFamily):
    """A family of Wan's classes.

    Attributes:
        shift: Shift of the noise levels towards noise, in training and sampling; 1 is none. None: the one of the folder's
            scheduler.

    The other keys are those of :class:`qvgen.models.pipeline_family.PipelineFamily`.

    Raises:
        ValueError: another shift.
    """

    shift: Annotated[float | None, SHIFT] = None

    transformer_class: ClassVar[str] = "WanTransformer3DModel"
    pipeline_class: ClassVar[str] = "WanPipeline"
    vae_class: ClassVar[str] = "AutoencoderKLWan"
    scheduler_classes: ClassVar[tuple[str, ...]] = tuple(_SHIFT_KEYS)
    layer_groups: ClassVar[Mapping[str, Sequence[str]]] = {
        "self_attention": ("blocks.*.attn1.*",),  # over space and time at once
        "cross_attention": ("blocks.*.attn2.*",),
        "ffn": ("blocks.*.ffn.*",),
    }
    shared_inputs: ClassVar[Sequence[Sequence[str]]] = WAN_SHARED_INPUTS
    original_names: ClassVar[OriginalNames] = WAN_ORIGINAL_NAMES

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift is not None:
            require_number("shift", self.shift, SHIFT)

    @staticmethod
    def clean_caption(caption: str) -> str:
        """A caption as WanPipeline hands it to its tokenizer."""
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        return str(prompt_clean(caption))

    def scheduler(self) -> Any:
        """The folder's scheduler with this family's shift, new; see the base class."""
        scheduler = super().scheduler()
        if self.shift is None:
            return scheduler
        return type(scheduler).from_config(scheduler.config, **{_SHIFT_KEYS[type(scheduler).__name__]: self.shift})

    @cached_property
    def objective(self) -> Objective:
        """Flow matching with the shift that the scheduler samples with, or at a few-step model's timesteps.

        Raises:
            ValueError: the scheduler is of another kind.
        """
        scheduler = self.scheduler()
        config = scheduler.config
        is_flow = config.get("prediction_type", "flow_prediction") == "flow_prediction"
        if (
            not (is_flow and config.get("use_flow_sigmas", True))
            or config["num_train_timesteps"] != NUM_TRAIN_TIMESTEPS
        ):
            raise ValueError(
                f"{self.name}'s scheduler is no flow of {NUM_TRAIN_TIMESTEPS} timesteps: prediction_type="
                f"{config.get('prediction_type')}, use_flow_sigmas={config.get('use_flow_sigmas')}, "
                f"num_train_timesteps={config['num_train_timesteps']}"
            )
        lowest, highest = self._noise_range()
        shift = float(config[_SHIFT_KEYS[type(scheduler).__name__]])
        return drawn_objective(FlowMatching(shift=shift, lowest=lowest, highest=highest), self)

    def _noise_range(self) -> tuple[float, float]:
        """Noise levels that the transformer is made for."""
        return 0.0, 1.0

    @property
    def compression(self) -> tuple[int, int]:
        """Frames per latent frame (but the first) and pixels per latent pixel of the VAE."""
        config = self._vae_config  # files from before Wan2.2 lack both keys
        return int(config.get("scale_factor_temporal", 4)), int(config.get("scale_factor_spatial", 8))

    @property
    def patch_size(self) -> int:
        """Latent pixels along a side of a token."""
        return int(self.transformer_config["patch_size"][1])

    @property
    def condition_shape(self) -> tuple[int, int]:
        """(T, text_dim): tokens and channels of a caption's embedding."""
        return (self.max_text_tokens, int(self.transformer_config.get("text_dim", 4096)))  # the class's default

    def smoothing_folds(self, transformer: nn.Module) -> list[SmoothingFold]:
        """The places behind values and the norm of cross-attention; see :mod:`qvgen.models.wan_fold`."""
        return wan_folds(transformer)

    def predict(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "B C F H W"],
        timestep: Float[Tensor, " B"],
        condition: Mapping[str, Tensor],
    ) -> Float[Tensor, "B C F H W"]:
        """Predict the flow's velocity; see :meth:`qvgen.models.base.VideoDiT.predict`."""
        output: Tensor = transformer(
            hidden_states=noisy.to(transformer.dtype),
            timestep=timestep,
            encoder_hidden_states=condition["encoder_hidden_states"].to(transformer.dtype),
            return_dict=False,
        )[0]
        return output

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and 1 / standard deviation of the VAE's latents, [1, C, 1, 1, 1] in the dtype of ``like``."""
        config = self._module("vae", device=like.device).config
        mean, deviation = (torch.tensor(config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
        return mean.to(like), 1.0 / deviation.to(like)

    def _normalize(self, latents: Tensor) -> Tensor:
        mean, inverse = self._statistics(latents)
        return (latents - mean) * inverse

    def _denormalize(self, latents: Tensor) -> Tensor:
        mean, inverse = self._statistics(latents)
        return latents / inverse + mean  # the pipeline's order of operations, to the bit

    @property
    def steps_by_token(self) -> bool:
        """Whether the pipeline gives each token a timestep of its own, as Wan2.2's small model is sampled."""
        return bool(self.component_config("model_index").get("expand_timesteps", False))

    def _pipeline_options(self) -> dict[str, Any]:
        return {"expand_timesteps": self.steps_by_token}
