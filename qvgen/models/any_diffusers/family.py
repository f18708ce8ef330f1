"""Any text-to-video or text-to-image model of diffusers, by its pipeline: ``model=diffusers model.path=FOLDER``.

A family of its own knows its transformer. Here the folder's own pipeline is asked instead, by running its code without
weights and recording what it does (:mod:`qvgen.models.any_diffusers.outline`):

    captions    the pipeline's ``encode_prompt``; what it returns is what a caption becomes, in caches too
    predict     the pipeline is called with these embeddings, and stopped where it calls its transformer: its arguments, but
                for the noisy latents and the timestep, are those of training
    latents     scale and shift of each channel are read off what it gives its VAE to decode, not off names
    objective   by the class and configuration of its scheduler (:mod:`qvgen.models.any_diffusers.objective`)
    sampling    the pipeline itself, with the transformer exchanged

Sizes, steps and guidance are the defaults of the pipeline's call where the configuration says none. [ours] ``clean_caption``
and ``use_resolution_binning`` are off and ``complex_human_instruction`` is none: what a caption and a size mean depends on
neither what is installed nor on a table of sizes, and captions and negative prompts are encoded alike.

Left out: layers that share inputs, smoothing folds, packed tokens (Flux), guidance that the transformer is told, images
as conditions, several transformers, timesteps in other units than the scheduler's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar

import diffusers
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from qvgen.layers.smoothing_fold import SmoothingFold
from qvgen.models.any_diffusers.measured import Measured
from qvgen.models.any_diffusers.objective import SCHEDULERS, objective_of
from qvgen.models.any_diffusers.recorded_pipeline import TEXT, RecordedPipeline
from qvgen.models.any_diffusers.signature import PipelineSignature
from qvgen.models.base import Objective
from qvgen.models.guidance import GUIDANCE, NUM_STEPS
from qvgen.models.pipeline_family import PipelineFamily
from qvgen.models.published import known_models
from qvgen.models.sampled_video import SampledVideo

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class AnyDiffusers(PipelineFamily):
    """A model of diffusers that has no family of its own.

    Attributes:
        height: Height of a frame in pixels, in training and sampling. None: the default of the pipeline's call.
        width: Width of a frame in pixels, in training and sampling. None: likewise.
        num_frames: Frames of a clip in training. None: as sampled.
        sampling_frames: Frames of a video that is sampled. None: the pipeline's default; 1 where it makes images.
        num_inference_steps: Sampling steps of a video. None: the pipeline's default.
        guidance_scale: Factor of classifier-free guidance; 1 is none. None: the pipeline's default.

    The other keys are those of :class:`qvgen.models.folder_family.FolderFamily`.

    Raises:
        ValueError: No folder, or one whose pipeline is of a kind that is not supported; the message names what it is.
    """

    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, init=False)
    height: int | None = None  # type: ignore[assignment]
    width: int | None = None  # type: ignore[assignment]
    num_frames: int | None = None  # type: ignore[assignment]
    sampling_frames: int | None = None  # type: ignore[assignment]
    num_inference_steps: Annotated[int | None, NUM_STEPS] = None  # type: ignore[assignment]
    guidance_scale: Annotated[float | None, GUIDANCE] = None  # type: ignore[assignment]

    layer_groups: ClassVar[Mapping[str, Sequence[str]]] = {
        "cross_attention": ("*.attn2.*", "*.cross_attn.*"),
        "self_attention": ("*.attn1.*", "*.attn.*", "*.self_attn.*"),
        "ffn": ("*.ff.*", "*.ffn.*", "*.ff_context.*"),
    }
    shared_inputs: ClassVar[Sequence[Sequence[str]]] = ()

    def __post_init__(self) -> None:
        if self.path is None:
            raise ValueError(
                f"model={self.name} is whatever model.path holds, which is not given; write model.path=FOLDER, a folder of "
                "diffusers with model_index.json"
            )
        folder = self.folder_class.find(self.path, repository=self.repository, model=self.name)
        self.signature = PipelineSignature.read(folder.read_json("model_index.json"), given=f"model.path={self.path}")
        self._take_defaults()
        self.recorded = RecordedPipeline(
            self.signature,
            folder,
            parts=lambda name: self.scheduler() if name == "scheduler" else self._tokenizer(name),
            size=(self.sampling_frames, self.height, self.width),
            given=f"model.path={self.path}",
        )
        super().__post_init__()
        _ = self.objective, self.condition_shape  # whatever is not supported is refused now
        own = [model.name for model in known_models() if model.kind["the transformer's class"] == self.transformer_class]
        if own:
            log.info("%s has families that know it better: model=%s", self.transformer_class, " or ".join(own))

    def _take_defaults(self) -> None:
        """Fill what the configuration leaves open by the defaults of the pipeline's call."""
        frames = self.signature.frames_argument
        own = {
            "height": self.signature.default("height"),
            "width": self.signature.default("width"),
            "sampling_frames": 1 if frames is None else self.signature.default(frames),
            "num_inference_steps": self.signature.default("num_inference_steps"),
            "guidance_scale": self.signature.default("guidance_scale"),
        }
        for key, value in own.items():
            if getattr(self, key) is None:
                if value is None:
                    raise ValueError(
                        f"model.{key} is not given, and the call of a {self.signature.name} has no default; write model.{key}=..."
                    )
                setattr(self, key, float(value) if key == "guidance_scale" else value)
        if self.num_frames is None:
            self.num_frames = self.sampling_frames
        for key in ("num_frames", "sampling_frames"):
            if frames is None and (value := getattr(self, key)) != 1:
                raise ValueError(f"model.{key}={value}, and a {self.signature.name} makes images; write 1")

    def _check_kind(self, given: str) -> None:
        """Any pipeline that :class:`~qvgen.models.any_diffusers.signature.PipelineSignature` takes is of the right kind."""

    # What the folder says

    @property
    def pipeline_class(self) -> str:  # type: ignore[override]
        """Class of the pipeline."""
        return self.signature.name

    @property
    def transformer_class(self) -> str:  # type: ignore[override]
        """Class of the transformer."""
        return self.signature.transformer

    @property
    def vae_class(self) -> str:  # type: ignore[override]
        """Class of the autoencoder."""
        return self.signature.vae

    @property
    def text_encoders(self) -> dict[str, str]:
        """Folder -> class of transformers, of all text encoders."""
        return dict(self.signature.text_encoders)

    @property
    def _tokenizers(self) -> list[str]:
        return list(self.signature.tokenizers)

    def scheduler(self) -> Any:
        """The folder's scheduler, new.

        Raises:
            ValueError: Its objective is not known.
        """
        config = self.component_config("scheduler")
        if (name := config.get("_class_name")) not in SCHEDULERS:
            raise ValueError(f"model.path={self.path} has the scheduler {name}; model=diffusers knows {', '.join(SCHEDULERS)}")
        return getattr(diffusers, name).from_config(config)

    @cached_property
    def objective(self) -> Objective:
        """The formula that the folder's scheduler undoes; raises ValueError for one that is not known."""
        return objective_of(self.scheduler(), name=str(self.path), mu=self.measured.mu)

    # What its pipeline does

    @property
    def measured(self) -> Measured:
        """What the pipeline does with its latents, at the size of a sampled video."""
        return self.recorded.measured

    @cached_property
    def condition_arguments(self) -> Mapping[str, str]:  # type: ignore[override]
        """Name of a condition -> argument of the pipeline's call."""
        return self.recorded.arguments_of(self.recorded.encoded)

    @property
    def condition_shape(self) -> tuple[int, int]:
        """(T, D) of a caption's embedding."""
        _, tokens, channels = self.recorded.encoded[TEXT].shape
        return int(tokens), int(channels)

    @property
    def further_condition_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of what a caption becomes besides."""
        return {name: tuple(value.shape[1:]) for name, value in self.recorded.encoded.items() if name != TEXT}

    @property
    def max_text_tokens(self) -> int:  # type: ignore[override]
        """Tokens of a caption's embedding."""
        return self.condition_shape[0]

    @property
    def sample_shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W) of a training clip's latents."""
        channels, _, height, width = self.measured.shape
        return channels, (self.num_frames - 1) // self.compression[0] + 1, height, width

    @property
    def compression(self) -> tuple[int, int]:
        """Frames per latent frame (but the first) and pixels per latent pixel."""
        frames = self.measured.shape[1]
        temporal = 1 if frames == 1 else -(-(self.sampling_frames - 1) // (frames - 1))
        return temporal, self.height // self.measured.shape[2]

    @property
    def patch_size(self) -> int:
        """Latent pixels along a side of a token, where the transformer's configuration says so."""
        size = self.transformer_config.get("patch_size") or 1
        return int(size if isinstance(size, int) else size[-1])

    def check_clip(self, *, frames: int, height: int, width: int) -> None:
        """Raise ValueError for a size that VAE and patches do not divide, or more than one frame of an image."""
        if self.measured.is_image and frames != 1:
            raise ValueError(f"a clip of {frames}x{height}x{width} does not fit a {self.pipeline_class}, which makes images")
        super().check_clip(frames=frames, height=height, width=width)

    def smoothing_folds(self, transformer: nn.Module) -> list[SmoothingFold]:
        """None: what stands before a layer is not known here."""
        del transformer
        return []

    # Calls

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
            recording = self.recorded.record({"prompt": str(caption)}, self.recorded.size, until="texts", outline=outline)
            rows.append(self.recorded.conditions(recording))
        return {name: torch.cat([row[name] for row in rows]).float() for name in rows[0]}

    def to(self, device: torch.device | str) -> Any:
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
        return self.measured.prediction(transformer(**self.measured.call(recorded, noisy, timestep))[0])

    def _typed(self, condition: Mapping[str, Tensor], *, dtype: torch.dtype) -> dict[str, Tensor]:
        """Conditions in the types that ``encode_prompt`` returns: embeddings in the transformer's, masks of whole numbers."""
        kinds = {name: value.dtype for name, value in self.recorded.encoded.items()}
        return {name: condition[name].to(dtype if kind.is_floating_point else kind) for name, kind in kinds.items()}

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
        """One video or image, decoded by the pipeline itself."""
        pixels = torch.from_numpy(pipeline(**arguments, generator=generator)[0])[0]
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
                f"{list(latents.shape[1:])}, and its pipeline samples {list(wanted)}; model=diffusers can't train on clips of it"
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
