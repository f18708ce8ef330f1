"""Clips as pixels, decoded once and cached: what a VAE is trained on.

    video file --ClipReader--> uint8 [F, H, W, 3] --> FOLDER/latents/ab/KEY.safetensors, uint8 [3, F, H, W]

The cache is that of the latents, filled by the same code: for it this is a family whose VAE is the identity and whose text
encoder says nothing. So a killed run continues at the clip that it was at, bad clips are reported, and the same clips are
held out that are kept from the transformer later. 17 x 128 x 128 pixels take 0.8 MB.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from qvgen.data.clip_source import LatentFamily


class PixelClips:
    """The stand-in that ``data=clips`` sees in place of a model family; its samples' ``video`` is uint8 [3, F, H, W].

    Args:
        family: The family whose VAE is trained: size, rate, and which sizes fit.
    """

    latent_revision = "pixels uint8"
    text_revision = "none"

    def __init__(self, family: LatentFamily) -> None:
        self.name = family.name
        self.height, self.width = family.height, family.width
        self.num_frames, self.fps = family.num_frames, family.fps
        self.check_clip = family.check_clip

    @property
    def sample_shape(self) -> tuple[int, int, int, int]:
        """(3, F, H, W) of a clip of the model's own size."""
        return (3, self.num_frames, self.height, self.width)

    def encode_video(self, pixels: Float[Tensor, "B 3 F H W"]) -> UInt8[Tensor, "B 3 F H W"]:
        """Pixels in [-1, 1] as the bytes that they came from, exactly."""
        return ((pixels + 1) * 127.5).round().to(torch.uint8)

    def tokens_left_out(self, caption: str) -> int:
        """No token: captions are not encoded, so nothing of them is left out."""
        del caption
        return 0

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """An empty row for each caption."""
        return {"none": torch.empty(len(captions), 0)}


def pixels_from_bytes(video: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """uint8 0..255 as float32 in [-1, 1]; 0 -> -1 and 255 -> 1 exactly, as :func:`qvgen.data.clips.to_pixels`."""
    return video.float() / 127.5 - 1
