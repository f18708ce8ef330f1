"""The image in Wan's image-to-video models: Wan2.1 I2V 14B (arXiv 2503.20314) and the two experts of Wan2.2 I2V-A14B.

    input      16 channels of noisy latents, 4 of a mask and 16 of the image's latents, joined in this order
    mask       1 in the first latent frame, 0 in the others: a channel for each of the 4 frames that it stands for
    latents    of a clip whose first frame is the image and whose others are grey (0), normalized as the clip's are
    embedding  2.1 alone: the last hidden states but one of CLIP's image tower, of the image resized and cropped to 224 x 224.
               Each block attends to these 257 tokens besides the text, by Linears of their own (add_k_proj, add_v_proj)

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

from qvgen.models.image_family import ImageFamily, encoded_images, first_frame_of, load_image_processor
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

    def _image_processor(self) -> Any:
        """CLIP's, loaded once."""
        if "image_processor" not in self._loaded:
            self._loaded["image_processor"] = load_image_processor(self._require_folder())
        return self._loaded["image_processor"]

    def _sampling_parts(self, device: torch.device, guidance_scale: float) -> dict[str, Any]:
        encoder = self._module("image_encoder", device=device)
        return {
            **super()._sampling_parts(device, guidance_scale),
            "image_encoder": encoder,
            "image_processor": self._image_processor(),
        }
