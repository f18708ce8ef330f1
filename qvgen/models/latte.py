"""Latte-1, text to video (arXiv 2401.03048): spatial and temporal blocks in turns.

    transformer   LatteTransformer3DModel; latents as [B, C, F, H, W]. A spatial block attends within a frame and to the text,
                  a temporal one within a place of all frames, of which there are as many as its positions (16)
    objective     prediction of the noise, betas linear in t (qvgen.models.objectives); the channels behind the noise's are a
                  variance that DDIM does not use, and neither do training and calibration
    text          T5, 120 tokens, a caption lower-cased and stripped. Tokens behind a caption's own are left out: by the
                  pipeline in sampling, which cuts the negative prompt's to the same number, and by a mask in training
    latents       of an image VAE: each frame alone, times scaling_factor

[ours] The pipeline's further cleaning of captions (links, HTML, odd punctuation), which the authors use, needs
beautifulsoup4 and is off: the text that is encoded does not depend on what is installed.

Where smoothing vectors disappear: to_out <- to_v, of all attentions. Where they stay a multiplication: attn1.to_q, to_k,
to_v, ff.net.0.proj and proj_out (their modulations are a table plus an output of adaln_single that all blocks share);
attn2.to_q (it reads the residual stream); attn2.to_k and to_v (the text, one for all blocks); ff.net.2 and the embedders.

Left out: LoRA loaders (diffusers has none for it), the temporal decoder that its repository holds beside the VAE, joint
training on images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qvgen.layers.smoothing_fold import SmoothingFold, behind_values
from qvgen.models.base import Objective
from qvgen.models.few_step import drawn_objective
from qvgen.models.objectives import NUM_TRAIN_TIMESTEPS, EpsilonPrediction
from qvgen.models.pipeline_family import PipelineFamily

_DECODED_FRAMES = 14
"""Frames that LattePipeline decodes at a time."""


@dataclass(kw_only=True, eq=False)
class Latte(PipelineFamily):
    """The Latte family; its keys are those of :class:`qvgen.models.folder_family.FolderFamily`.

    Raises:
        ValueError: Another number of frames than the transformer has positions for.
    """

    transformer_class: ClassVar[str] = "LatteTransformer3DModel"
    pipeline_class: ClassVar[str] = "LattePipeline"
    vae_class: ClassVar[str] = "AutoencoderKL"
    text_encoder_class: ClassVar[str] = "T5EncoderModel"
    scheduler_classes: ClassVar[tuple[str, ...]] = ("DDIMScheduler",)
    max_text_tokens: ClassVar[int] = 120
    frames_argument: ClassVar[str] = "video_length"
    layer_groups: ClassVar[Mapping[str, Sequence[str]]] = {
        "cross_attention": ("transformer_blocks.*.attn2.*",),
        "temporal_attention": ("temporal_transformer_blocks.*.attn1.*",),
        "self_attention": ("transformer_blocks.*.attn1.*",),
        "ffn": ("transformer_blocks.*.ff.*", "temporal_transformer_blocks.*.ff.*"),
    }
    shared_inputs: ClassVar[Sequence[Sequence[str]]] = (
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        ("attn2.to_k", "attn2.to_v"),  # the text
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("num_frames", "sampling_frames"):
            self._check_frames(getattr(self, key), what=f"model.{key}={getattr(self, key)}")

    def _check_frames(self, frames: int, *, what: str) -> None:
        positions = self._positions
        if frames not in (1, positions):
            nearest = 1 if frames < (positions + 1) / 2 else positions
            raise ValueError(
                f"{what} does not fit {self.name}, whose transformer has positions for {positions} frames, or one; "
                f"use {nearest}"
            )

    @property
    def _positions(self) -> int:
        return int(self.transformer_config.get("video_length", 16))  # the class's default

    def check_clip(self, *, frames: int, height: int, width: int) -> None:
        """Raise ValueError for a number of frames or a size that transformer, VAE and patches do not take."""
        self._check_frames(frames, what=f"a clip of {frames}x{height}x{width}")
        super().check_clip(frames=frames, height=height, width=width)

    def scheduler(self) -> Any:
        """The folder's scheduler, new; see the base class.

        Its pipeline takes a ``variance_type`` of another scheduler's, which DDIM has not, for a sign that it wants the
        variance too: it is left out.
        """
        scheduler = super().scheduler()
        config = {key: value for key, value in scheduler.config.items() if key != "variance_type"}
        return type(scheduler).from_config(config)

    @cached_property
    def objective(self) -> Objective:
        """Prediction of the noise on the schedule of the folder's scheduler, or at a few-step model's timesteps.

        Raises:
            ValueError: The scheduler is of another kind.
        """
        config = self.scheduler().config
        wanted = {
            "prediction_type": "epsilon",
            "beta_schedule": "linear",
            "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
            "trained_betas": None,
            "rescale_betas_zero_snr": False,
        }
        for key, value in wanted.items():
            if config[key] != value:
                raise ValueError(f"{self.name}'s scheduler has {key}={config[key]}; {value} is supported")
        formula = EpsilonPrediction(beta_start=config["beta_start"], beta_end=config["beta_end"])
        return drawn_objective(formula, self)

    @property
    def compression(self) -> tuple[int, int]:
        """1: the VAE is one of images; and pixels per latent pixel."""
        return 1, 2 ** (len(self._vae_config["block_out_channels"]) - 1)

    @property
    def patch_size(self) -> int:
        """Latent pixels along a side of a token."""
        return int(self.transformer_config["patch_size"])

    @property
    def condition_shape(self) -> tuple[int, int]:
        """(120, caption_channels): tokens and channels of a caption's embedding."""
        return (self.max_text_tokens, int(self.transformer_config["caption_channels"]))

    @property
    def further_condition_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The mask of a caption's own tokens."""
        return {"encoder_attention_mask": (self.max_text_tokens,)}

    def smoothing_folds(self, transformer: nn.Module) -> list[SmoothingFold]:
        """The places behind values; see the head of this file."""
        folds = []
        for index in range(len(transformer.transformer_blocks)):  # type: ignore[arg-type]
            folds += [behind_values(f"transformer_blocks.{index}.{name}") for name in ("attn1", "attn2")]
            folds.append(behind_values(f"temporal_transformer_blocks.{index}.attn1"))
        return folds

    def predict(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "B C F H W"],
        timestep: Float[Tensor, " B"],
        condition: Mapping[str, Tensor],
    ) -> Float[Tensor, "B C F H W"]:
        """Predict the noise; see :meth:`qvgen.models.base.VideoDiT.predict`."""
        own = condition["encoder_attention_mask"].to(transformer.dtype)
        output: Tensor = transformer(
            hidden_states=noisy.to(transformer.dtype),
            timestep=timestep,
            encoder_hidden_states=condition["encoder_hidden_states"].to(transformer.dtype),
            encoder_attention_mask=((1 - own) * -10000.0).unsqueeze(1).repeat_interleave(noisy.shape[2], dim=0),
            return_dict=False,
        )[0]
        return output[:, : noisy.shape[1]]

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Run the text encoder as the pipeline does, each caption alone.

        Returns:
            ``encoder_hidden_states`` float32 [B, 120, D]; ``encoder_attention_mask`` [B, 120], 1 at a caption's own tokens.

        Raises:
            ValueError: tokenizer or weights are missing.
        """
        pipeline = self._pipeline(tokenizer=self._tokenizer(), text_encoder=self._module("text_encoder"))
        embeddings, masks = [], []
        for caption in captions:
            embeddings.append(pipeline.encode_prompt(caption, False, device=self._device, mask_feature=False)[0])
            used = len(self._tokenizer()(self.clean_caption(caption), verbose=False).input_ids)
            masks.append((torch.arange(self.max_text_tokens, device=self._device) < used).float())
        return {"encoder_hidden_states": torch.cat(embeddings).float(), "encoder_attention_mask": torch.stack(masks)}

    @staticmethod
    def clean_caption(caption: str) -> str:
        """A caption as LattePipeline hands it to its tokenizer, without its cleaning."""
        return caption.lower().strip()

    @torch.no_grad()
    def encode_video(self, pixels: Float[Tensor, "B 3 F H W"]) -> Float[Tensor, "B C f h w"]:
        """Turn clips into latents, each frame alone; see :meth:`qvgen.models.base.LatentVideoDiT.encode_video`."""
        clips, _, frames, height, width = pixels.shape
        self.check_clip(frames=frames, height=height, width=width)
        vae = self._module("vae")
        latents = vae.encode(pixels.transpose(1, 2).flatten(0, 1).to(self._device, vae.dtype)).latent_dist.mode()
        return self._normalize(latents.unflatten(0, (clips, frames)).transpose(1, 2)).float()

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "B C f h w"], *, num_frames: int | None = None
    ) -> Float[Tensor, "B 3 F H W"]:
        """Turn latents into pixels as the pipeline does; see :meth:`qvgen.models.base.LatentVideoDiT.decode`."""
        del num_frames
        vae = self._module("vae", device=latents.device)
        frames = self._denormalize(latents.to(vae.dtype)).transpose(1, 2).flatten(0, 1)
        parts = [vae.decode(part, return_dict=False)[0] for part in frames.split(_DECODED_FRAMES)]
        pixels: Tensor = torch.cat(parts).unflatten(0, (len(latents), -1)).transpose(1, 2)
        return pixels.float()

    def _normalize(self, latents: Tensor) -> Tensor:
        return latents * self._vae_config["scaling_factor"]

    def _denormalize(self, latents: Tensor) -> Tensor:
        return 1 / self._vae_config["scaling_factor"] * latents

    def _call_options(self, guidance_scale: float) -> dict[str, Any]:
        return {
            **super()._call_options(guidance_scale),
            "negative_prompt": None,
            "clean_caption": False,
            "mask_feature": False,
        }

    def _prompt_arguments(
        self, condition: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None
    ) -> dict[str, Any]:
        """Embeddings of the caption's own tokens, and as many of the negative prompt's: the pipeline has no mask."""
        used = int(condition["encoder_attention_mask"].sum())
        given = {"prompt_embeds": condition["encoder_hidden_states"][:, :used]}
        if negative is not None:
            given["negative_prompt_embeds"] = negative["encoder_hidden_states"][:, :used]
        return given
