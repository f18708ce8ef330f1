"""LTX-Video, text to video: 2B (arXiv 2501.00103, 0.9.0 to 0.9.5) and 13B (0.9.7 and 0.9.8).

    transformer   LTXVideoTransformer3DModel; latents as tokens [B, F H W, C] of one latent pixel each, text by
                  cross-attention with a mask of the caption's own tokens
    positions     rotary, of seconds and pixels: the frame rate is part of them. 2B is told a scale of its latent grid; 13B
                  the coordinates themselves, in which the first latent frame is one frame long
    objective     rectified flow. 2B: shift exp(mu), mu linear in the tokens of a sampled video (the scheduler's dynamic
                  shift). 13B: drawn as its sampler's steps lie (:mod:`qvgen.models.linear_quadratic`), half above 0.975
    latents       (z - latents_mean) scaling_factor / latents_std per channel; buffers of the VAE
    VAE           from 0.9.1 on its decoder is told a timestep and does the last step of denoising itself, of latents with a
                  little noise mixed in; 0.9.1's adds noise of its own, which is the same for every video here

Where smoothing vectors disappear: attn1.to_out and attn2.to_out <- to_v. Where they stay a multiplication: attn1.to_q, to_k,
to_v, ff.net.0.proj and proj_out (their modulations are a table plus an output of time_embed that all blocks share, and the
norms have no affine part); attn2.to_q (it reads the residual stream); attn2.to_k and to_v (the text, one for all blocks);
ff.net.2, the embedders and proj_in.

Left out: image and video conditions; the second, larger scale of 13B's multi-scale pipeline and its spatio-temporal guidance;
LTX-2; and in training's draws the stretch of a sampler's last noise levels to ``shift_terminal`` (0.1), below which 1 in 120
draws of 2B lies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from qvgen.config.schema.value_range import Range
from qvgen.layers.smoothing_fold import SmoothingFold, behind_values
from qvgen.models.base import Objective
from qvgen.models.few_step import drawn_objective
from qvgen.models.linear_quadratic import LinearQuadraticFlow
from qvgen.models.objectives import NUM_TRAIN_TIMESTEPS, FlowMatching
from qvgen.models.original.names import LTX_CAUSAL_ORIGINAL_NAMES, LTX_ORIGINAL_NAMES, OriginalNames
from qvgen.models.pipeline_family import PipelineFamily

_SHARE = Range("[0, 1]")


@dataclass(kw_only=True, eq=False)
class LTX(PipelineFamily):
    """The LTX-Video family that LTXPipeline samples.

    Attributes:
        guidance_rescale: Share of a guided prediction whose deviation is brought back to that of the one with a caption
            (arXiv 2305.08891, Sec. 3.4); 0 is none.
        decode_timestep: Timestep, in [0, 1], that the VAE's decoder is told; one without ``timestep_conditioning`` (0.9.0) is
            told none.
        decode_noise_scale: Share of noise that is mixed into sampled latents before such a decoder.

    The other keys are those of :class:`qvgen.models.folder_family.FolderFamily`.

    Raises:
        ValueError: A share outside of [0, 1], or a transformer whose tokens are larger than a latent pixel.
    """

    guidance_rescale: Annotated[float, _SHARE]
    decode_timestep: Annotated[float, _SHARE]
    decode_noise_scale: Annotated[float, _SHARE]

    transformer_class: ClassVar[str] = "LTXVideoTransformer3DModel"
    pipeline_class: ClassVar[str] = "LTXPipeline"
    vae_class: ClassVar[str] = "AutoencoderKLLTXVideo"
    text_encoder_class: ClassVar[str] = "T5EncoderModel"
    scheduler_classes: ClassVar[tuple[str, ...]] = ("FlowMatchEulerDiscreteScheduler",)
    max_text_tokens: ClassVar[int] = 128
    condition_arguments: ClassVar[Mapping[str, str]] = {
        "encoder_hidden_states": "prompt_embeds",
        "encoder_attention_mask": "prompt_attention_mask",
    }
    layer_groups: ClassVar[Mapping[str, Sequence[str]]] = {
        "self_attention": ("transformer_blocks.*.attn1.*",),  # over space and time at once
        "cross_attention": ("transformer_blocks.*.attn2.*",),
        "ffn": ("transformer_blocks.*.ff.*",),
    }
    shared_inputs: ClassVar[Sequence[Sequence[str]]] = (
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        ("attn2.to_k", "attn2.to_v"),  # the text
    )
    original_names: ClassVar[OriginalNames] = LTX_ORIGINAL_NAMES

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("guidance_rescale", "decode_timestep", "decode_noise_scale"):
            _SHARE.check(getattr(self, key), key=f"model.{key}")
        for key in ("patch_size", "patch_size_t"):
            if (size := self.transformer_config.get(key, 1)) != 1:
                raise ValueError(f"{self.name}'s transformer has {key}={size}; LTXPipeline samples those with 1 alone")

    def _lay_out(self, scheduler: Any, num_steps: int) -> None:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=self._mu(scheduler.config))

    @cached_property
    def objective(self) -> Objective:
        """Flow matching with the noise levels that a video is sampled with, or at a few-step model's timesteps.

        Raises:
            ValueError: The scheduler is of another kind.
        """
        config = self.scheduler().config
        wanted = {"num_train_timesteps": NUM_TRAIN_TIMESTEPS, "invert_sigmas": False, "time_shift_type": "exponential"}
        for key, value in wanted.items():
            if config[key] != value:
                raise ValueError(f"{self.name}'s scheduler has {key}={config[key]}; {value} is supported")
        return drawn_objective(self._flow(config), self)

    def _flow(self, levels: Mapping[str, Any]) -> FlowMatching:
        """The objective of a scheduler's noise levels."""
        if not levels["use_dynamic_shifting"]:
            return FlowMatching(shift=float(levels["shift"]))
        return FlowMatching(shift=math.exp(self._mu(levels)))

    def _mu(self, levels: Mapping[str, Any]) -> float:
        """Logarithm of a dynamic shift, for the tokens of a sampled video; in the pipeline's order of operations."""
        first = levels["base_image_seq_len"]
        slope = (levels["max_shift"] - levels["base_shift"]) / (levels["max_image_seq_len"] - first)
        return float(math.prod(self._sampled_grid) * slope + (levels["base_shift"] - slope * first))

    @property
    def compression(self) -> tuple[int, int]:
        """Frames per latent frame (but the first) and pixels per latent pixel of the VAE."""
        config = self._vae_config
        halvings = 2 ** sum(config["spatio_temporal_scaling"])
        temporal = config.get("temporal_compression_ratio") or config["patch_size_t"] * halvings
        return int(temporal), int(config.get("spatial_compression_ratio") or config["patch_size"] * halvings)

    @property
    def patch_size(self) -> int:
        """Latent pixels along a side of a token."""
        return 1

    @property
    def condition_shape(self) -> tuple[int, int]:
        """(T, caption_channels): tokens and channels of a caption's embedding."""
        return (self.max_text_tokens, int(self.transformer_config.get("caption_channels", 4096)))  # the class's default

    @property
    def further_condition_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The mask of a caption's own tokens."""
        return {"encoder_attention_mask": (self.max_text_tokens,)}

    def smoothing_folds(self, transformer: nn.Module) -> list[SmoothingFold]:
        """The places behind values; see the head of this file."""
        blocks = range(len(transformer.transformer_blocks))  # type: ignore[arg-type]
        return [behind_values(f"transformer_blocks.{i}.{name}") for i in blocks for name in ("attn1", "attn2")]

    def predict(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "B C F H W"],
        timestep: Float[Tensor, " B"],
        condition: Mapping[str, Tensor],
    ) -> Float[Tensor, "B C F H W"]:
        """Predict the flow's velocity; see :meth:`qvgen.models.base.VideoDiT.predict`."""
        output: Tensor = transformer(
            hidden_states=noisy.flatten(2).transpose(1, 2).to(transformer.dtype),
            encoder_hidden_states=condition["encoder_hidden_states"].to(transformer.dtype),
            timestep=timestep,
            encoder_attention_mask=condition["encoder_attention_mask"],
            **self._positions(noisy),
            return_dict=False,
        )[0]
        return output.transpose(1, 2).unflatten(2, noisy.shape[2:])

    def _positions(self, noisy: Tensor) -> dict[str, Any]:
        """Arguments of the transformer that say where its tokens are."""
        frames, height, width = noisy.shape[2:]
        temporal, spatial = self.compression
        scale = (temporal / self.fps, spatial, spatial)
        return {"num_frames": frames, "height": height, "width": width, "rope_interpolation_scale": scale}

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "B C f h w"], *, num_frames: int | None = None
    ) -> Float[Tensor, "B 3 F H W"]:
        """Turn latents into pixels; no noise is mixed in. See :meth:`qvgen.models.base.LatentVideoDiT.decode`."""
        del num_frames
        return self._decode_raw(self._denormalize(latents))

    def _decode_sampled(self, latents: Tensor, *, generator: torch.Generator) -> Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        latents = self._denormalize(latents)
        if self._vae_config.get("timestep_conditioning", False):
            options = {"device": latents.device, "dtype": latents.dtype}
            share = torch.tensor(self.decode_noise_scale, **options)  # type: ignore[arg-type]
            noise = randn_tensor(latents.shape, generator=generator, **options)
            latents = (1 - share) * latents + share * noise
        return self._decode_raw(latents)

    def _decode_raw(self, latents: Tensor) -> Tensor:
        """Decode latents of the VAE's own scale."""
        vae = self._module("vae", device=latents.device)
        options = {"device": latents.device, "dtype": vae.dtype}
        timestep = None
        if vae.config.timestep_conditioning:
            timestep = torch.full((len(latents),), self.decode_timestep, **options)
        adds_noise = any(vae.config.decoder_inject_noise)  # of torch's own generator
        devices = [latents.device] if latents.is_cuda else []
        with torch.random.fork_rng(devices=devices) if adds_noise else nullcontext():
            if adds_noise:
                torch.manual_seed(0)
            pixels: Tensor = vae.decode(latents.to(vae.dtype), timestep, return_dict=False)[0]
        return pixels

    def _normalize(self, latents: Tensor) -> Tensor:
        mean, deviation, scale = self._statistics(latents)
        return (latents - mean) * scale / deviation

    def _denormalize(self, latents: Tensor) -> Tensor:
        mean, deviation, scale = self._statistics(latents)
        return latents * deviation / scale + mean  # the pipeline's order of operations, to the bit

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor, float]:
        """Mean and deviation [1, C, 1, 1, 1] of the VAE's latents in the dtype of ``like``, and its scaling factor."""
        vae = self._module("vae", device=like.device)
        mean, deviation = (value.view(1, -1, 1, 1, 1).to(like) for value in (vae.latents_mean, vae.latents_std))
        return mean, deviation, float(vae.config.scaling_factor)

    @property
    def _sampled_grid(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a video that is sampled."""
        temporal, spatial = self.compression
        return ((self.sampling_frames - 1) // temporal + 1, self.height // spatial, self.width // spatial)

    def _from_pipeline(self, latents: Tensor) -> Tensor:
        return latents.transpose(1, 2).unflatten(2, self._sampled_grid)

    def _call_options(self, guidance_scale: float) -> dict[str, Any]:
        options = {"guidance_rescale": self.guidance_rescale, "frame_rate": self.fps}
        return {**super()._call_options(guidance_scale), **options}


@dataclass(kw_only=True, eq=False)
class LTXCondition(LTX):
    """The LTX-Video family that LTXConditionPipeline samples, without conditions; its keys are those of :class:`LTX`."""

    pipeline_class: ClassVar[str] = "LTXConditionPipeline"
    max_text_tokens: ClassVar[int] = 256
    original_names: ClassVar[OriginalNames] = LTX_CAUSAL_ORIGINAL_NAMES

    def scheduler(self) -> Any:
        """The folder's scheduler, new; see the base class.

        Its pipeline tells it timesteps alone, of which it makes the noise levels itself, with a warning for every video: here
        both are told, the same ones.
        """
        scheduler = super().scheduler()
        set_timesteps = scheduler.set_timesteps

        def set_both(*, timesteps: Tensor, device: torch.device) -> None:
            told = timesteps.float().cpu().numpy()
            set_timesteps(timesteps=told, sigmas=told / NUM_TRAIN_TIMESTEPS, device=device)

        scheduler.set_timesteps = set_both
        return scheduler

    def _lay_out(self, scheduler: Any, num_steps: int) -> None:
        from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule

        scheduler.set_timesteps(timesteps=linear_quadratic_schedule(num_steps) * 1000, device=torch.device("cpu"))

    def _flow(self, levels: Mapping[str, Any]) -> FlowMatching:
        if levels["use_dynamic_shifting"] or levels["shift"] != 1:
            raise ValueError(
                f"{self.name}'s scheduler has use_dynamic_shifting={levels['use_dynamic_shifting']} and shift="
                f"{levels['shift']}; its pipeline lays out the noise levels itself, which needs false and 1"
            )
        return LinearQuadraticFlow()

    def _positions(self, noisy: Tensor) -> dict[str, Any]:
        temporal, spatial = self.compression
        axes = [torch.arange(size, device=noisy.device) for size in noisy.shape[2:]]
        frame, row, column = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
        first = (frame * temporal + 1 - temporal).clamp(min=0)  # the first latent frame is of one frame
        seconds = first.float() * (1.0 / self.fps)
        coordinates = torch.stack([seconds, (row * spatial).float(), (column * spatial).float()])
        return {"video_coords": coordinates.expand(len(noisy), -1, -1)}

    def _from_pipeline(self, latents: Tensor) -> Tensor:
        return latents
