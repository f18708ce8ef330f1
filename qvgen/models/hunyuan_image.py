"""HunyuanVideo 1.5, image to video (arXiv 2511.18870): what :mod:`qvgen.models.hunyuan_video15` has zeros for is of an image.

    input      32 channels of noisy latents, 32 of the image's latents and 1 of a mask, joined in this order
    latents    the VAE's of the image alone, times scaling_factor; behind the first latent frame they are 0
    mask       1 in the first latent frame, 0 in the others
    tokens     the last hidden states of SigLIP's image tower, of the image resized to 384 x 384: 729 more of the text's
               stream, which all blocks attend to

The image is the same in the call without the caption: guidance is by the text alone.

[ours] The pipeline samples a video of a size out of its own list, the nearest to the image's aspect ratio. Here a video has
``height`` and ``width``, as clips and captions without an image have, and the pipeline resizes and crops the image to them as
it does to a size of its own. Where it would choose this very size, both are the same video.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from qvgen.models.hunyuan_family import HunyuanFamily
from qvgen.models.image_family import ImageFamily, first_frame_of


@dataclass(kw_only=True, eq=False)
class HunyuanEmbeddedImage(ImageFamily, HunyuanFamily):
    """A model that is told an image's latents and tokens; its keys are those of its :class:`HunyuanFamily`."""

    pipeline_class: ClassVar[str] = "HunyuanVideo15ImageToVideoPipeline"
    image_encoder_classes: ClassVar[tuple[str, ...]] = ("SiglipVisionModel",)
    image_processor: ClassVar[tuple[str, str]] = ("feature_extractor", "SiglipImageProcessor")
    crops_images: ClassVar[bool] = True

    @property
    def image_condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the image's latents with their mask, [C + 1, f, h, w], and of SigLIP's tokens."""
        channels, *sizes = self.sample_shape
        config = self.component_config("image_encoder")
        tokens = (int(config["image_size"]) // int(config["patch_size"])) ** 2
        width = int(self.transformer_config.get("image_embed_dim", 1152))  # the class's default
        return {"image_latents": (channels + 1, *sizes), "image_embeds": (tokens, width)}

    @torch.no_grad()
    def encode_first_frame(self, pixels: Float[Tensor, "B 3 F H W"]) -> dict[str, Tensor]:
        """Latents of the first frames with zeros behind them, their mask, and SigLIP's tokens; see the base class."""
        latents = self.encode_video(pixels[:, :, :1])
        count, channels, _, *sizes = latents.shape
        joined = latents.new_zeros(count, channels + 1, (pixels.shape[2] - 1) // self.compression[0] + 1, *sizes)
        joined[:, :channels, :1], joined[:, channels, 0] = latents, 1
        pipeline: Any = self._pipeline_type()
        parts = {"image_encoder": self._module("image_encoder"), "feature_extractor": self._image_processor()}
        rows = [
            pipeline._get_image_embeds(**parts, image=image, device=self._device) for image in first_frame_of(pixels)
        ]
        return {"image_latents": joined, "image_embeds": torch.cat(rows).float()}

    def _image(self, latents: Tensor, condition: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return condition["image_latents"].to(latents), condition["image_embeds"].to(latents)

    def _pipeline(self, **components: Any) -> Any:
        pipeline = super()._pipeline(**{"image_encoder": None, "feature_extractor": None, **components})
        pipeline.video_processor.calculate_default_height_width = lambda **_: (self.height, self.width)
        return pipeline

    def _sizes(self) -> dict[str, int]:
        return {self.frames_argument: self.sampling_frames}  # the rest is the image's, see the head of this file

    def _sampling_parts(self, device: torch.device, guidance_scale: float) -> dict[str, Any]:
        return {
            **super()._sampling_parts(device, guidance_scale),
            "image_encoder": self._module("image_encoder", device=device),
            "feature_extractor": self._image_processor(),
        }
