"""CogVideoX: text to video of 2b and 5b (arXiv 2408.06072) and 1.5-5B, image to video of 5b and 1.5-5B.

    transformer   CogVideoXTransformer3DModel; latents as [B, F, C, H, W], text and video tokens in one sequence
    positions     2b: sincos, added by the transformer; 5b and 1.5: a rotary embedding that the caller computes
    objective     v-prediction on whole timesteps, zero terminal SNR (qvgen.models.objectives)
    latents       VAE latents times scaling_factor, for all three models. The VAE's ``invert_scale_latents`` belongs to the
                  image condition of 1.5's image-to-video model alone: its pipelines decode by 1 / scaling_factor too
    1.5           tokens span 2 latent frames; where a clip has an odd number its first latent frame is repeated in
                  front (CogVideo's trainer), and the pipeline drops what it put there before it decodes

Image to video:

    input      16 channels of noisy latents and 16 of the image's latents, joined in this order; behind the first latent frame
               the image's are 0
    latents    the VAE's of the image alone, times scaling_factor; of 1.5 divided by it (the VAE's ``invert_scale_latents``)
    positions  5b: a learned table beside the rotary embedding, for 480 x 720 pixels alone; 1.5 takes other sizes
    1.5        is told an ``ofs`` of 2, as its pipeline does; where a clip's latent frames are odd in number, one is put in
               front of them, and the image's latents stand there

The authors trained with some noise in the image's latents; sampling has none, and neither has training here, whose teacher
knows what to make of it. The pipeline draws the image's latents from the VAE's posterior, training takes its mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qvgen.layers.smoothing_fold import SmoothingFold
from qvgen.models.base import Objective
from qvgen.models.cogvideox_fold import COGVIDEOX_SHARED_INPUTS, cogvideox_folds
from qvgen.models.few_step import drawn_objective
from qvgen.models.image_family import ImageFamily
from qvgen.models.objectives import NUM_TRAIN_TIMESTEPS, VPrediction
from qvgen.models.pipeline_family import PipelineFamily

_OFS = 2.0
"""The number that 1.5's pipeline tells its transformer."""


@dataclass(kw_only=True, eq=False)
class CogVideoX(PipelineFamily):
    """The CogVideoX family; its keys are those of :class:`qvgen.models.pipeline_family.PipelineFamily`."""

    transformer_class: ClassVar[str] = "CogVideoXTransformer3DModel"
    pipeline_class: ClassVar[str] = "CogVideoXPipeline"
    vae_class: ClassVar[str] = "AutoencoderKLCogVideoX"
    text_encoder_class: ClassVar[str] = "T5EncoderModel"
    scheduler_classes: ClassVar[tuple[str, ...]] = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
    max_text_tokens: ClassVar[int] = 226
    layer_groups: ClassVar[Mapping[str, Sequence[str]]] = {
        "self_attention": ("transformer_blocks.*.attn1.*",),  # over text, space and time at once
        "ffn": ("transformer_blocks.*.ff.*",),
    }
    shared_inputs: ClassVar[Sequence[Sequence[str]]] = COGVIDEOX_SHARED_INPUTS

    _rotary: dict[tuple[int, int, int, torch.device], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    @cached_property
    def objective(self) -> Objective:
        """v-prediction on the schedule of the folder's scheduler, or at a few-step model's timesteps.

        Raises:
            ValueError: the scheduler is of another kind.
        """
        config = self.scheduler().config
        wanted = {
            "prediction_type": "v_prediction",
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
            "trained_betas": None,
        }
        for key, value in wanted.items():
            if config[key] != value:
                raise ValueError(f"{self.name}'s scheduler has {key}={config[key]}; {value} is supported")
        formula = VPrediction(
            beta_start=config["beta_start"],
            beta_end=config["beta_end"],
            snr_shift_scale=config["snr_shift_scale"],
            zero_terminal_snr=config["rescale_betas_zero_snr"],
        )
        return drawn_objective(formula, self)

    @property
    def compression(self) -> tuple[int, int]:
        """Frames per latent frame (but the first) and pixels per latent pixel of the VAE."""
        config = self._vae_config
        return int(config["temporal_compression_ratio"]), 2 ** (len(config["block_out_channels"]) - 1)

    @property
    def patch_size(self) -> int:
        """Latent pixels along a side of a token."""
        return int(self.transformer_config["patch_size"])

    @property
    def condition_shape(self) -> tuple[int, int]:
        """(226, text_embed_dim): tokens and channels of a caption's embedding."""
        return (self.max_text_tokens, int(self.transformer_config.get("text_embed_dim", 4096)))  # the class's default

    def frame_padding(self, num_frames: int) -> int:
        """Latent frames in front of a clip's own; 0 but for 1.5, whose tokens span several."""
        frames = (num_frames - 1) // self.compression[0] + 1
        return -frames % (self.transformer_config.get("patch_size_t") or 1)

    def smoothing_folds(self, transformer: nn.Module) -> list[SmoothingFold]:
        """The places behind norms and values; see :mod:`qvgen.models.cogvideox_fold`."""
        return cogvideox_folds(transformer)

    def predict(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "B C F H W"],
        timestep: Float[Tensor, " B"],
        condition: Mapping[str, Tensor],
    ) -> Float[Tensor, "B C F H W"]:
        """Predict v; see :meth:`qvgen.models.base.VideoDiT.predict`."""
        output: Tensor = transformer(
            hidden_states=noisy.to(transformer.dtype).transpose(1, 2),
            encoder_hidden_states=condition["encoder_hidden_states"].to(transformer.dtype),
            timestep=timestep,
            image_rotary_emb=self._rotary_embedding(transformer, noisy),
            return_dict=False,
        )[0]
        return output.transpose(1, 2)

    def _rotary_embedding(self, transformer: nn.Module, noisy: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines float32 [tokens, head size] each, by the pipeline's own function; None for 2b."""
        if not transformer.config.use_rotary_positional_embeddings:
            return None
        frames, height, width = noisy.shape[2:]
        key = (frames, height, width, noisy.device)
        if key not in self._rotary:
            pipeline = self._pipeline(transformer=transformer)
            scale = pipeline.vae_scale_factor_spatial
            self._rotary[key] = pipeline._prepare_rotary_positional_embeddings(
                height * scale, width * scale, frames, noisy.device
            )
        return self._rotary[key]

    def _normalize(self, latents: Tensor) -> Tensor:
        return latents * self._vae_config["scaling_factor"]

    def _denormalize(self, latents: Tensor) -> Tensor:
        return 1 / self._vae_config["scaling_factor"] * latents

    def _from_pipeline(self, latents: Tensor) -> Tensor:
        return latents.transpose(1, 2)


@dataclass(kw_only=True, eq=False)
class CogVideoXImage(ImageFamily, CogVideoX):
    """CogVideoX for images; its keys are those of :class:`CogVideoX`.

    Raises:
        ValueError: A size that the model's learned positions do not have.
    """

    pipeline_class: ClassVar[str] = "CogVideoXImageToVideoPipeline"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positions(height=self.height, width=self.width)

    def check_clip(self, *, frames: int, height: int, width: int) -> None:
        """Raise ValueError for a size that VAE and patches do not divide, or that the learned positions do not have."""
        super().check_clip(frames=frames, height=height, width=width)
        self._check_positions(height=height, width=width)

    def _check_positions(self, *, height: int, width: int) -> None:
        config, spatial = self.transformer_config, self.compression[1]
        own = [int(config[key]) * spatial for key in ("sample_height", "sample_width")]
        if config.get("use_learned_positional_embeddings") and own != [height, width]:
            raise ValueError(
                f"{height} x {width} pixels: model={self.name} has learned positions for {own[0]} x {own[1]} alone; write "
                f"model.height={own[0]} model.width={own[1]}"
            )

    @property
    def image_condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of the image's latents, [C, f, h, w], for one clip of the training's size."""
        return {"image_latents": self.sample_shape}

    @torch.no_grad()
    def encode_first_frame(self, pixels: Float[Tensor, "B 3 F H W"]) -> dict[str, Tensor]:
        """The first frames' latents with zeros behind them; see the base class."""
        vae = self._module("vae")
        frame = vae.encode(pixels[:, :, :1].to(self._device, vae.dtype)).latent_dist.mode()
        factor = float(self._vae_config["scaling_factor"])
        frame = (frame / factor if self._vae_config.get("invert_scale_latents") else frame * factor).float()
        num_frames = pixels.shape[2]
        behind = self.frame_padding(num_frames) + (num_frames - 1) // self.compression[0]
        zeros = frame.new_zeros(*frame.shape[:2], behind, *frame.shape[3:])
        return {"image_latents": torch.cat([frame, zeros], dim=2)}

    def predict(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "B C F H W"],
        timestep: Float[Tensor, " B"],
        condition: Mapping[str, Tensor],
    ) -> Float[Tensor, "B C F H W"]:
        """Predict v; see :meth:`qvgen.models.base.VideoDiT.predict`."""
        joined = torch.cat([noisy, condition["image_latents"].to(noisy)], dim=1).to(transformer.dtype)
        told = {} if transformer.config.ofs_embed_dim is None else {"ofs": joined.new_full((1,), _OFS)}
        output: Tensor = transformer(
            hidden_states=joined.transpose(1, 2),
            encoder_hidden_states=condition["encoder_hidden_states"].to(transformer.dtype),
            timestep=timestep,
            image_rotary_emb=self._rotary_embedding(transformer, noisy),
            return_dict=False,
            **told,
        )[0]
        return output.transpose(1, 2)

    def _pipeline_type(self) -> Any:
        from qvgen.models.cogvideox_pipeline import ImagePipeline  # it imports transformers: a plan does without

        return ImagePipeline
