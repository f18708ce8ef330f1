"""The image in Wan's image-to-video models: Wan2.1 I2V 14B (arXiv 2503.20314), the experts of Wan2.2 I2V-A14B, TI2V-5B.

Wan2.1 and the experts are told the image beside the video:

    input      16 channels of noisy latents, 4 of a mask and 16 of the image's latents, joined in this order
    mask       1 in the first latent frame, 0 in the others: a channel for each of the 4 frames that it stands for
    latents    of a clip whose first frame is the image and whose others are grey (0), normalized as the clip's are
    embedding  2.1 alone: the last hidden states but one of CLIP's image tower, of the image resized and cropped to 224 x 224.
               Each block attends to these 257 tokens besides the text, by Linears of their own (add_k_proj, add_v_proj)

TI2V-5B has the image in the video, as its first latent frame (``expand_timesteps`` of WanImageToVideoPipeline):

    input      the image's latents, without noise, then the noisy latents of the other frames: no channel more than for text
    timestep   of every token: 0 for those of the first frame, the sample's own for the others
    sample     the other frames alone. They are what is noised, predicted, compared with the teacher and measured; what the
               transformer answers for the first frame is thrown away, as the pipeline throws it away (``predicted_part``)
    band       of noise: the sample's own for all of its tokens (:meth:`qvgen.layers.noise_band.NoiseBand.set_timestep`)

The image is the same in the call without the caption: guidance is by the text alone. The families are
:mod:`qvgen.models.wan`'s. Left out: a last image (the first-last-frame models).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qvgen.models.image_family import ImageFamily, encoded_images, first_frame_of
from qvgen.models.wan_family import WanFamily


@dataclass(kw_only=True, eq=False)
class WanLatentImage(ImageFamily, WanFamily):
    """A model that is told the image's latents; its keys are those of :class:`qvgen.models.wan_family.WanFamily`."""

    pipeline_class: ClassVar[str] = "WanImageToVideoPipeline"

    @property
    def image_condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of mask and image latents, [4 + C, f, h, w], for one clip of the training's size."""
        channels, *sizes = self.sample_shape
        return {"image_latents": (self.compression[0] + channels, *sizes)}

    @torch.no_grad()
    def encode_first_frame(self, pixels: Float[Tensor, "B 3 F H W"]) -> dict[str, Tensor]:
        """Mask and latents of the first frames; see the base class."""
        grey = torch.cat([pixels[:, :, :1], torch.zeros_like(pixels[:, :, 1:])], dim=2)
        latents = self.encode_video(grey)
        mask = latents.new_zeros(len(latents), self.compression[0], *latents.shape[2:])
        mask[:, :, 0] = 1
        return {"image_latents": torch.cat([mask, latents], dim=1)}

    def predict(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "B C F H W"],
        timestep: Float[Tensor, " B"],
        condition: Mapping[str, Tensor],
    ) -> Float[Tensor, "B C F H W"]:
        """Predict the flow's velocity; see :meth:`qvgen.models.base.VideoDiT.predict`."""
        embedding = condition.get("image_embeds")
        output: Tensor = transformer(
            hidden_states=torch.cat([noisy, condition["image_latents"].to(noisy)], dim=1).to(transformer.dtype),
            timestep=timestep,
            encoder_hidden_states=condition["encoder_hidden_states"].to(transformer.dtype),
            encoder_hidden_states_image=None if embedding is None else embedding.to(transformer.dtype),
            return_dict=False,
        )[0]
        return output


@dataclass(kw_only=True, eq=False)
class WanEmbeddedImage(WanLatentImage):
    """A model that is told CLIP's embedding too; its keys are those of :class:`qvgen.models.wan_family.WanFamily`."""

    image_encoder_classes: ClassVar[tuple[str, ...]] = ("CLIPVisionModelWithProjection", "CLIPVisionModel")

    @property
    def image_condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the latents, and of CLIP's tokens."""
        config = self.component_config("image_encoder")
        tokens = (int(config["image_size"]) // int(config["patch_size"])) ** 2 + 1  # patches, and one for all
        return {**super().image_condition_shapes, "image_embeds": (tokens, int(self.transformer_config["image_dim"]))}

    @torch.no_grad()
    def encode_first_frame(self, pixels: Float[Tensor, "B 3 F H W"]) -> dict[str, Tensor]:
        """Mask and latents of the first frames, and CLIP's embeddings of them; see the base class."""
        embedding = encoded_images(
            first_frame_of(pixels), processor=self._image_processor(), encoder=self._module("image_encoder")
        )
        return {**super().encode_first_frame(pixels), "image_embeds": embedding}

    def _sampling_parts(self, device: torch.device, guidance_scale: float) -> dict[str, Any]:
        encoder = self._module("image_encoder", device=device)
        return {
            **super()._sampling_parts(device, guidance_scale),
            "image_encoder": encoder,
            "image_processor": self._image_processor(),
        }


@dataclass(kw_only=True, eq=False)
class WanFirstFrame(ImageFamily, WanFamily):
    """A model whose first latent frame is the image; its keys are those of :class:`qvgen.models.wan_family.WanFamily`.

    Raises:
        ValueError: Clips or videos of one frame, behind which there is none to predict.
    """

    pipeline_class: ClassVar[str] = "WanImageToVideoPipeline"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("num_frames", "sampling_frames"):
            self._check_frames(getattr(self, key), given=f"model.{key}={getattr(self, key)}")

    def check_clip(self, *, frames: int, height: int, width: int) -> None:
        """Raise ValueError for a size that VAE and patches do not divide, or a clip that is the image alone."""
        super().check_clip(frames=frames, height=height, width=width)
        self._check_frames(frames, given=f"a clip of {frames}x{height}x{width}")

    def _check_frames(self, frames: int, *, given: str) -> None:
        if frames <= 1:
            raise ValueError(
                f"{given}: model={self.name} predicts the frames behind an image, and there is none; use "
                f"{1 + self.compression[0]} frames or more"
            )

    @property
    def sample_shape(self) -> tuple[int, int, int, int]:
        """(C, F - 1, H, W) of the latents of a training clip's frames behind the first."""
        channels, frames, height, width = super().sample_shape
        return (channels, frames - 1, height, width)

    @property
    def image_condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of the image's latents, [C, 1, h, w], for one clip of the training's size."""
        channels, _, *sizes = self.sample_shape
        return {"image_latents": (channels, 1, *sizes)}

    def encode_video(self, pixels: Float[Tensor, "B 3 F H W"]) -> Float[Tensor, "B C f h w"]:
        """Turn clips into the normalized latents of their frames behind the first; see the base class.

        The VAE is causal: the first frame's latents are those of the frame alone, and nothing of them is lost.
        """
        return super().encode_video(pixels)[:, :, 1:]

    @torch.no_grad()
    def encode_first_frame(self, pixels: Float[Tensor, "B 3 F H W"]) -> dict[str, Tensor]:
        """Latents of the first frames; see the base class."""
        vae = self._module("vae")
        latents = vae.encode(pixels[:, :, :1].to(self._device, vae.dtype)).latent_dist.mode()
        return {"image_latents": self._normalize(latents).float()}

    def predict(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "B C F H W"],
        timestep: Float[Tensor, " B"],
        condition: Mapping[str, Tensor],
    ) -> Float[Tensor, "B C F H W"]:
        """Predict the flow's velocity of the frames behind the image.

        See :meth:`qvgen.models.base.VideoDiT.predict`. The transformer is called with a timestep for each token, [B, tokens].
        """
        video = torch.cat([condition["image_latents"].to(noisy), noisy], dim=2)
        frames, height, width = video.shape[2:]
        is_noisy = timestep.new_ones(frames, height // self.patch_size, width // self.patch_size)
        is_noisy[0] = 0
        output: Tensor = transformer(
            hidden_states=video.to(transformer.dtype),
            timestep=timestep[:, None] * is_noisy.flatten(),
            encoder_hidden_states=condition["encoder_hidden_states"].to(transformer.dtype),
            return_dict=False,
        )[0]
        return self.predicted_part(output)

    @staticmethod
    def predicted_part(output: Float[Tensor, "B C F H W"]) -> Float[Tensor, "B C f H W"]:
        """The transformer's answer for the frames behind the image; see :func:`qvgen.models.base.predicted_part`."""
        return output[:, :, 1:]
