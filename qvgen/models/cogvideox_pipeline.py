"""diffusers' pipeline of CogVideoX for images, with a VAE that may have another precision than the transformer."""

from __future__ import annotations

from typing import Any

from diffusers import CogVideoXImageToVideoPipeline
from torch import Tensor


class ImagePipeline(CogVideoXImageToVideoPipeline):  # type: ignore[misc] - diffusers has no types
    """The pipeline that casts the image to the VAE's type; its own bits where transformer and VAE have one type."""

    def prepare_latents(self, image: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Noise and the image's latents, in the transformer's precision."""
        found: tuple[Tensor, Tensor] = super().prepare_latents(image.to(self.vae.dtype), *arguments, **named)
        return found
