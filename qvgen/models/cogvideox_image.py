"""CogVideoX, image to video: CogVideoX-5b-I2V (arXiv 2408.06072) and CogVideoX1.5-5B-I2V.

    input      16 channels of noisy latents and 16 of the image's latents, joined in this order; behind the first latent frame
               the image's are 0
    latents    the VAE's of the image alone, times scaling_factor; of 1.5 divided by it (the VAE's ``invert_scale_latents``)
    positions  5b: a learned table beside the rotary embedding, for 480 x 720 pixels alone; 1.5 takes other sizes
    1.5        is told an ``ofs`` of 2, as its pipeline does; where a clip's latent frames are odd in number, one is put in
               front of them, and the image's latents stand there

The authors trained with some noise in the image's latents; sampling has none, and neither has training here, whose teacher
knows what to make of it. The pipeline draws the image's latents from the VAE's posterior, training takes its mode.

What else the model is, is :mod:`qvgen.models.cogvideox`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import CogVideoXImageToVideoPipeline
from jaxtyping import Float
from torch import Tensor, nn

from qvgen.models.cogvideox import CogVideoX
from qvgen.models.image_family import ImageFamily

_OFS = 2.0
"""The number that 1.5's pipeline tells its transformer."""


class _ImagePipeline(CogVideoXImageToVideoPipeline):  # type: ignore[misc] - diffusers has no types
    """The pipeline with a VAE that may have another precision than the transformer; its own where both have one."""

    def prepare_latents(self, image: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Noise and the image's latents, in the transformer's precision."""
        found: tuple[Tensor, Tensor] = super().prepare_latents(image.to(self.vae.dtype), *arguments, **named)
        return found


@dataclass(kw_only=True, eq=False)
class CogVideoXImage(ImageFamily, CogVideoX):
    """CogVideoX for images; its keys are those of :class:`qvgen.models.cogvideox.CogVideoX`.

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
        return _ImagePipeline
