"""Any text-to-video or text-to-image model of diffusers, by its pipeline: ``model=diffusers model.path=FOLDER``.

A family of its own knows its transformer. Here the folder's own pipeline is asked instead, by running its code without
weights and recording what it does (:mod:`qvgen.models.recorded.outline`):

    captions    the pipeline's ``encode_prompt``; what it returns is what a caption becomes, in caches too
    predict     the pipeline is called with these embeddings, and stopped where it calls its transformer: its arguments, but
                for the noisy latents and the timestep, are those of training
    latents     scale and shift of each channel are read off what it gives its VAE to decode, not off names
    objective   by the class and configuration of its scheduler (:mod:`qvgen.models.recorded.objective`)
    sampling    the pipeline itself, with the transformer exchanged

Sizes, steps and guidance are the defaults of the pipeline's call where the configuration says none. [ours] ``clean_caption``
and ``use_resolution_binning`` are off and ``complex_human_instruction`` is none: what a caption and a size mean depends on
neither what is installed nor on a table of sizes, and captions and negative prompts are encoded alike.

Left out: layers that share inputs, smoothing folds, packed tokens (Flux), guidance that the transformer is told, images
as conditions, several transformers, timesteps in other units than the scheduler's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from qvgen.layers.smoothing_fold import SmoothingFold
from qvgen.models.recorded.described_family import DescribedFamily
from qvgen.models.recorded.recorded_pipeline import TEXT
from qvgen.models.sampled_video import SampledVideo


@dataclass(kw_only=True, eq=False)
class AnyDiffusers(DescribedFamily):
    """A model of diffusers that has no family of its own.

    Its keys are those of :class:`qvgen.models.recorded.described_family.DescribedFamily`.
    """

    def smoothing_folds(self, transformer: nn.Module) -> list[SmoothingFold]:
        """None: what stands before a layer is not known here."""
        del transformer
        return []

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Run the pipeline's ``encode_prompt``, each caption alone.

        Returns:
            float32 tensors with a row for each caption; ``encoder_hidden_states`` [B, T, D].

        Raises:
            ValueError: A tokenizer or weights are missing.
        """
        encoders = {name: self._module(name) for name in self.text_encoders}
        outline = self.recorded.outline(getattr(torch, self.text_encoder_dtype), self._device, encoders=encoders)
        rows = []
        for caption in captions:
            recording = self.recorded.record(
                {"prompt": str(caption)}, self.recorded.size, until="texts", outline=outline
            )
            rows.append(self.recorded.conditions(recording))
        return {name: torch.cat([row[name] for row in rows]).float() for name in rows[0]}

    def to(self, device: torch.device | str) -> Self:
        """Choose where text encoders and VAE run; they are moved when they are next used."""
        self.recorded.forget()
        return super().to(device)

    def release(self) -> None:
        """Forget text encoders, tokenizers and VAE and free their memory; they are loaded again when needed."""
        self.recorded.forget()
        super().release()

    def predict(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "B C F H W"],
        timestep: Float[Tensor, " B"],
        condition: Mapping[str, Tensor],
    ) -> Float[Tensor, "B C F H W"]:
        """Call the transformer as the pipeline does; see :meth:`qvgen.models.base.VideoDiT.predict`."""
        temporal, spatial = self.compression
        frames, height, width = noisy.shape[2:]
        size = ((frames - 1) * temporal + 1, height * spatial, width * spatial)
        outline = self.recorded.outline(transformer.dtype, noisy.device)
        given = self._prompt_arguments(self._typed(condition, dtype=transformer.dtype), None)
        recorded = self.recorded.record(given, size, until="call", outline=outline).calls[0]
        told = timestep.to(self._told_dtype).to(timestep.dtype)
        return self.measured.prediction(transformer(**self.measured.call(recorded, noisy, told))[0])

    def _prompt_arguments(
        self, condition: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None
    ) -> dict[str, Any]:
        dtype = condition[TEXT].dtype
        typed = None if negative is None else self._typed(negative, dtype=dtype)
        return super()._prompt_arguments(self._typed(condition, dtype=dtype), typed)

    def _call_options(self, guidance_scale: float) -> dict[str, Any]:
        return {**super()._call_options(guidance_scale), **self.recorded.fixed}

    def _sizes(self) -> dict[str, int]:
        return self.recorded.sizes(self.recorded.size)

    def _pipeline_options(self) -> dict[str, Any]:
        return dict(self.signature.options)

    def _sample(
        self, pipeline: Any, arguments: Mapping[str, Any], sampled: SampledVideo, *, generator: torch.Generator
    ) -> UInt8[Tensor, "F H W 3"]:
        """One video or image, decoded by the pipeline itself.

        Raises:
            ValueError: Its code and its scheduler's do not fit each other for a single step: PixArt-alpha's takes what other
                schedulers do not return there.
        """
        try:
            made = pipeline(**arguments, generator=generator)[0]
        except IndexError as error:
            if len(pipeline.scheduler.timesteps) > 1:
                raise
            raise ValueError(
                f"model.path={self.path}: a {self.pipeline_class} with {type(pipeline.scheduler).__name__} can't sample in a "
                f"single step ({error}); write model.num_inference_steps=2 or more"
            ) from error
        pixels = torch.from_numpy(made)[0]
        sampled.check_finite(pixels, name="pixels")
        frames = (pixels * 255).round().to(torch.uint8)
        return frames.unsqueeze(0) if self.measured.is_image else frames

    # Latents

    @torch.no_grad()
    def encode_video(self, pixels: Float[Tensor, "B 3 F H W"]) -> Float[Tensor, "B C f h w"]:
        """Turn clips into latents, by the mode of the VAE's posterior where it has one.

        See :meth:`qvgen.models.base.LatentVideoDiT.encode_video`.
        """
        frames, height, width = pixels.shape[2:]
        self.check_clip(frames=frames, height=height, width=width)
        vae = self._module("vae")
        given = (pixels[:, :, 0] if self.measured.is_image else pixels).to(self._device, vae.dtype)
        found = vae.encode(given)
        latents = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latent
        latents = latents.unsqueeze(2) if self.measured.is_image else latents
        temporal, spatial = self.compression
        wanted = (self.measured.shape[0], (frames - 1) // temporal + 1, height // spatial, width // spatial)
        if tuple(latents.shape[1:]) != wanted:
            raise ValueError(
                f"model.path={self.path}: the VAE turns a clip of {frames}x{height}x{width} into latents of "
                f"{list(latents.shape[1:])}, and its pipeline samples {list(wanted)}; clips of it can't be trained on"
            )
        return self._normalize(latents).float()

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "B C f h w"], *, num_frames: int | None = None
    ) -> Float[Tensor, "B 3 F H W"]:
        """Turn latents into pixels; see :meth:`qvgen.models.base.LatentVideoDiT.decode`."""
        del num_frames
        vae = self._module("vae", device=latents.device)
        given = self._denormalize(latents.to(vae.dtype))
        pixels: Tensor = vae.decode(given[:, :, 0] if self.measured.is_image else given, return_dict=False)[0]
        return pixels.unsqueeze(2) if self.measured.is_image else pixels

    def _normalize(self, latents: Tensor) -> Tensor:
        return self.measured.normalize(latents)

    def _denormalize(self, latents: Tensor) -> Tensor:
        return self.measured.denormalize(latents)
