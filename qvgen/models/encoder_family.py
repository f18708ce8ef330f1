"""The encoders of a family over a diffusers model: text encoders, VAE, and what identifies their results.

    captions --text encoder--> embeddings          pixels --VAE--> latents

Text encoder and VAE are loaded when they are first needed, stay until
:meth:`~qvgen.models.folder_family.FolderFamily.release`, and run where
:meth:`~qvgen.models.folder_family.FolderFamily.to` put them. Sampling is :mod:`qvgen.models.pipeline_family`'s.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from qvgen.models.base import TensorReader
from qvgen.models.folder.model_class import model_class
from qvgen.models.folder_family import FolderFamily
from qvgen.models.tensor_reader import read_tensors_of, with_loras


@dataclass(kw_only=True, eq=False)
class EncoderFamily(FolderFamily):
    """A family whose captions and clips are encoded by the parts of a folder.

    Its keys are those of :class:`qvgen.models.folder_family.FolderFamily`.
    """

    max_text_tokens: ClassVar[int]
    condition_arguments: ClassVar[Mapping[str, str]] = {"encoder_hidden_states": "prompt_embeds"}
    """Tensors that a caption becomes, in the order in which ``encode_prompt`` returns them -> the pipeline's names for them;
    ``negative_`` stands before those of the negative prompt."""
    encode_options: ClassVar[Mapping[str, Any]] = {"do_classifier_free_guidance": False}
    """Arguments of ``encode_prompt`` besides caption, device and number of tokens."""

    def check_sampling_parts(self) -> None:
        """Find out in seconds whether what texts and videos need besides the transformers is there and whole.

        Raises:
            ValueError: the autoencoder, the text encoder or the tokenizer is missing, cut off or quantized already.
        """
        if self.folder is not None:
            self.folder.check_parts(("vae", *self.encoders))
            for name in self._tokenizers:
                self.folder.check_tokenizer(name)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Run the text encoder as the pipeline does, each caption alone: an embedding has no batch mates.

        Returns:
            Tensors of ``condition_arguments``, float32, at least ``encoder_hidden_states`` [B, T, D], where :meth:`to` says.

        Raises:
            ValueError: tokenizer or weights are missing.
        """
        parts = {name: self._tokenizer(name) for name in self._tokenizers}
        pipeline = self._pipeline(**parts, **{name: self._module(name) for name in self.text_encoders})
        options = {**self.encode_options, "device": self._device, "max_sequence_length": self.max_text_tokens}
        rows = [pipeline.encode_prompt(caption, **options) for caption in captions]
        return {
            name: torch.cat([row[place] for row in rows]).float() for place, name in enumerate(self.condition_arguments)
        }

    @property
    def _tokenizers(self) -> list[str]:
        """Names of the tokenizers: ``tokenizer_2`` is that of ``text_encoder_2``."""
        return [name.replace("text_encoder", "tokenizer") for name in self.text_encoders]

    def tokens_left_out(self, caption: str) -> int:
        """How many of a caption's tokens :meth:`encode` leaves out: those beyond ``max_text_tokens``.

        Raises:
            ValueError: the tokenizer is missing.
        """
        tokens = self._tokenizer()(self.clean_caption(caption), verbose=False).input_ids
        return max(0, len(tokens) - self.max_text_tokens)

    @staticmethod
    def clean_caption(caption: str) -> str:
        """A caption as the pipeline hands it to its tokenizer."""
        return caption

    @property
    def latent_revision(self) -> str:
        """Content key of whatever decides :meth:`encode_video`: the VAE's weights and dtype, how latents are padded.

        Raises:
            ValueError: there are no weights.
        """
        patch_frames = self.transformer_config.get("patch_size_t") or 1
        return f"{self.component_revision('vae')} {self.vae_dtype} {patch_frames}"

    @property
    def text_revision(self) -> str:
        """Content key of whatever decides :meth:`encode`: text encoder, its dtype, tokenizer, number of tokens.

        Raises:
            ValueError: there are no weights.
        """
        encoders = [self.component_revision(name) for name in self.text_encoders]
        tokenizers = [self._require_folder().files_revision(name) for name in self._tokenizers]
        return " ".join([*encoders, *tokenizers, self.text_encoder_dtype, str(self.max_text_tokens)])

    def check_clip(self, *, frames: int, height: int, width: int) -> None:
        """Raise ValueError for a size that VAE and patches do not divide."""
        temporal, spatial = self.compression
        multiple = spatial * self.patch_size
        if (frames - 1) % temporal or height % multiple or width % multiple:
            raise ValueError(
                f"a clip of {frames}x{height}x{width} does not fit {self.name}: frames must be {temporal} n + 1, "
                f"height and width multiples of {multiple}"
            )

    def tensor_reader(self) -> TensorReader | None:
        """Give a reader of single tensors of the transformer that is trained, LoRAs in them; None for a finetune of it."""
        if self._finetune is not None:
            return None
        folder, part = self._require_folder(), self.transformer_folder
        read = read_tensors_of(folder.weight_files(part), remedy=folder.remedy(f"{part}/*"))
        return with_loras(read, self._loras, component=part, build=lambda: self.build(self.transformer_config))

    @torch.no_grad()
    def encode_video(self, pixels: Float[Tensor, "B 3 F H W"]) -> Float[Tensor, "B C f h w"]:
        """Turn clips into the normalized latents that the transformer is trained on: the mode of the VAE's posterior.

        Args:
            pixels: float [B, 3, F, H, W] in [-1, 1]; F is 1 more than a multiple of the VAE's temporal compression.

        Returns:
            float32 [B, C, f, h, w], where :meth:`to` says.

        Raises:
            ValueError: for frames or sizes that do not divide.
        """
        frames, height, width = pixels.shape[2:]
        self.check_clip(frames=frames, height=height, width=width)
        vae = self._module("vae")
        latents = self._normalize(vae.encode(pixels.to(self._device, vae.dtype)).latent_dist.mode()).float()
        padding = self.frame_padding(frames)
        return torch.cat([latents[:, :, :1]] * padding + [latents], dim=2)

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "B C f h w"], *, num_frames: int | None = None
    ) -> Float[Tensor, "B 3 F H W"]:
        """Turn normalized latents into pixels, as the pipeline does.

        Args:
            latents: float [B, C, f, h, w]; the VAE follows them to their device.
            num_frames: F of the clip that they are of; None: as in training.

        Returns:
            float [B, 3, F, H, W] about [-1, 1], not clamped, in the VAE's dtype.
        """
        vae = self._module("vae", device=latents.device)
        own = latents[:, :, self.frame_padding(num_frames or self.num_frames) :]
        pixels: Tensor = vae.decode(self._denormalize(own.to(vae.dtype)), return_dict=False)[0]
        return pixels

    def _tokenizer(self, name: str = "tokenizer") -> Any:
        if name not in self._loaded:
            self._loaded[name] = self._require_folder().load_tokenizer(name)
        return self._loaded[name]

    def _module(self, component: str, *, device: torch.device | None = None) -> Any:
        """An encoder or the VAE, loaded once, on ``device`` or where :meth:`to` says."""
        if component not in self._loaded:
            if component == "vae":
                kind = model_class(self.vae_class)
            else:  # transformers takes seconds: a plan does without
                kind = getattr(import_module("transformers"), self.encoders[component])
            sees = component not in self.text_encoders  # the VAE, and the encoder of an image
            dtype = getattr(torch, self.vae_dtype if sees else self.text_encoder_dtype)
            self._loaded[component] = self._require_folder().load(component, kind, dtype=dtype)
        return self._loaded[component].to(device or self._device)

    @abc.abstractmethod
    def _normalize(self, latents: Tensor) -> Tensor:
        """From the VAE's latents [B, C, f, h, w] to the transformer's."""

    @abc.abstractmethod
    def _denormalize(self, latents: Tensor) -> Tensor:
        """From the transformer's latents to the VAE's."""

    @abc.abstractmethod
    def _pipeline(self, **components: Any) -> Any:
        """The diffusers pipeline with the components that a call needs."""
