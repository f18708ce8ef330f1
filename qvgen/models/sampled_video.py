"""The checks that a sampled video passes before anybody sees it: finite latents and pixels, and more than one colour.

A NaN anywhere in a model becomes a black video, which a player shows without complaint. It is refused where it is sampled,
by caption, seed and kind of model, so that no file is written.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import UInt8
from torch import Tensor, nn

from qvgen.errors import UserError
from qvgen.layers.swap import packed_layers, quantized_layers
from qvgen.quant.finite import check_finite

_REMEDY = {
    "latents": "check the model's weights (qvgen inspect for a packed one), or sample in a dtype of more range",
    "pixels": "the VAE left its dtype's range; write model.vae_dtype=float32",
}


class UnusableVideoError(UserError):
    """A sampled video is not one that anybody should see."""


@dataclass(frozen=True, kw_only=True)
class SampledVideo:
    """Names a video that metrics look at.

    Attributes:
        transformer: what sampled it; only its kind is named.
        caption: Caption of the video.
        seed: Seed of its noise.
    """

    transformer: nn.Module
    caption: str
    seed: int

    def __str__(self) -> str:
        """For example: the packed model's video of 'a red boat' with seed 3."""
        packed, fake = packed_layers(self.transformer), quantized_layers(self.transformer)
        kind = "packed" if packed else "fake-quantized" if fake else "full-precision"
        return f"the {kind} model's video of {self.caption!r} with seed {self.seed}"

    def check_finite(self, values: Tensor, *, name: str) -> None:
        """Look at its values before they are rounded to pixels.

        Args:
            values: float [...], any shape.
            name: ``latents`` or ``pixels``.

        Raises:
            UnusableVideoError: a value is NaN or infinite.
        """
        try:
            check_finite([(name, values)], source=str(self), remedy=_REMEDY[name])
        except UserError as error:
            raise UnusableVideoError(str(error)) from error

    def check_frames(self, frames: UInt8[Tensor, "F H W 3"]) -> None:
        """Look at its frames.

        Raises:
            UnusableVideoError: all pixels of all frames have the same value.
        """
        if (value := int(frames.amin())) == int(frames.amax()):
            raise UnusableVideoError(
                f"{self}: every pixel of its {len(frames)} frames is {value}; {_REMEDY['latents']}"
            )
