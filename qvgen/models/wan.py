"""Wan, text to video: Wan2.1 1.3B and 14B (arXiv 2503.20314), Wan2.2 TI2V-5B and A14B.

    transformer   WanTransformer3DModel; latents as [B, C, F, H, W], text by cross-attention
    objective     flow matching with the shift that the model is sampled with (qvgen.models.objectives)
    latents       (z - latents_mean) / latents_std per channel, of the VAE's configuration
    TI2V-5B       its pipeline gives every token a timestep of its own (an image's tokens have t = 0); in text to video
                  all of a sample's are equal, so that training passes one number per sample: the same function

    A14B          two transformers: transformer/ for timesteps from 1000 boundary_ratio (875) on, transformer_2/ for those
                  below. Each is trained and packed on its own, on noise levels of its own part alone; the pipeline
                  calls the other one beside it

Left out: image conditions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from jaxtyping import Float
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from qvgen.models.objectives import NUM_TRAIN_TIMESTEPS, FlowMatching
from qvgen.models.pipeline_family import PipelineFamily

_SHIFT_KEYS = {"UniPCMultistepScheduler": "flow_shift", "FlowMatchEulerDiscreteScheduler": "shift"}
_EXPERT_FOLDERS = {"high": "transformer", "low": "transformer_2"}


@dataclass(kw_only=True, eq=False)
class Wan(PipelineFamily):
    """The Wan family.

    Attributes:
        shift: of the noise levels in training and sampling; None: the folder's scheduler's (3 suits 480p, 5 720p).

    The other keys are those of :class:`qvgen.models.folder_family.FolderFamily`.
    """

    shift: float | None = None

    transformer_class: ClassVar[str] = "WanTransformer3DModel"
    pipeline_class: ClassVar[Any] = WanPipeline
    vae_class: ClassVar[Any] = AutoencoderKLWan
    text_encoder_class: ClassVar[Any] = UMT5EncoderModel
    scheduler_classes: ClassVar[tuple[str, ...]] = tuple(_SHIFT_KEYS)
    max_text_tokens: ClassVar[int] = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_experts(self.component_config("model_index").get("boundary_ratio"))

    def _check_experts(self, boundary: float | None) -> None:
        if boundary is not None:
            raise ValueError(
                f"model.path={self.path} holds two experts, which model={self.name} has not; use model=wan2.2-a14b"
            )

    def scheduler(self) -> Any:
        """The folder's scheduler with this family's shift, new; see the base class."""
        scheduler = super().scheduler()
        if self.shift is None:
            return scheduler
        return type(scheduler).from_config(scheduler.config, **{_SHIFT_KEYS[type(scheduler).__name__]: self.shift})

    @cached_property
    def objective(self) -> FlowMatching:
        """Flow matching with the shift that the scheduler samples with.

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
        return FlowMatching(shift=float(config[_SHIFT_KEYS[type(scheduler).__name__]]), lowest=lowest, highest=highest)

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
        """(512, text_dim): tokens and channels of a caption's embedding."""
        return (self.max_text_tokens, int(self.transformer_config.get("text_dim", 4096)))  # the class's default

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

    def _from_pipeline(self, latents: Tensor) -> Tensor:
        return latents

    def _pipeline_options(self) -> dict[str, Any]:
        return {"expand_timesteps": bool(self.component_config("model_index").get("expand_timesteps", False))}


@dataclass(kw_only=True, eq=False)
class WanExpert(Wan):
    """One of the two experts.

    Attributes:
        expert: high or low: the noise levels of the transformer that is trained.
        guidance_scale_low: classifier-free guidance at the low-noise expert's steps; ``guidance_scale`` is the other's.

    The other keys are those of :class:`Wan`.

    Raises:
        ValueError: another expert, or a folder without experts.
    """

    expert: str
    guidance_scale_low: float

    transformer_folders: ClassVar[tuple[str, ...]] = ("transformer", "transformer_2")

    def __post_init__(self) -> None:
        if self.expert not in _EXPERT_FOLDERS:
            raise ValueError(f"model.expert={self.expert} is not among {', '.join(_EXPERT_FOLDERS)}")
        super().__post_init__()

    @property
    def transformer_folder(self) -> str:
        """Folder of the expert that is trained."""
        return _EXPERT_FOLDERS[self.expert]

    def use_partner(self, transformer: nn.Module) -> None:
        """Sample with this transformer as the other expert, until :meth:`release`; it must be on the same device."""
        self._loaded["partner"] = transformer

    def _check_experts(self, boundary: float | None) -> None:
        if boundary is None:
            raise ValueError(
                f"model.path={self.path} says no boundary_ratio: it holds one transformer; use model=wan-14b"
            )
        self._boundary = float(boundary)

    def _noise_range(self) -> tuple[float, float]:
        return (self._boundary, 1.0) if self.expert == "high" else (0.0, self._boundary)

    def _pipeline(self, **components: Any) -> Any:
        if (transformer := components.get("transformer")) is not None:
            pair = (transformer, self._partner(transformer))
            components["transformer"], components["transformer_2"] = pair if self.expert == "high" else pair[::-1]
        return super()._pipeline(**components)

    def _partner(self, like: nn.Module) -> nn.Module:
        """The other expert, with its own part of the LoRA, in the dtype and on the device of the one that is sampled."""
        if "partner" not in self._loaded:
            (folder,) = set(_EXPERT_FOLDERS.values()) - {self.transformer_folder}
            self._loaded["partner"] = self._load_transformer(folder, dtype=like.dtype)
        partner: nn.Module = self._loaded["partner"].to(next(like.parameters()).device)
        return partner

    def _pipeline_options(self) -> dict[str, Any]:
        return {**super()._pipeline_options(), "boundary_ratio": self._boundary}

    def _call_options(self) -> dict[str, Any]:
        return {"guidance_scale_2": self.guidance_scale_low}
