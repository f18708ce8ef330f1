"""The part of ``model=diffusers`` that says what the model is: sizes, classes, shapes, objective.

Sizes, steps and guidance that the configuration leaves open are the defaults of the pipeline's call; shapes are those of what
it does without weights (:mod:`qvgen.models.recorded.recorded_pipeline`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from qvgen.models.base import Objective
from qvgen.models.few_step import drawn_objective
from qvgen.models.folder.published import known_models
from qvgen.models.guidance import GUIDANCE, NUM_STEPS
from qvgen.models.lora.merge import merge_loras_
from qvgen.models.pipeline_family import PipelineFamily
from qvgen.models.recorded.measured import Measured
from qvgen.models.recorded.objective import SCHEDULERS, objective_of
from qvgen.models.recorded.recorded_pipeline import TEXT, RecordedPipeline
from qvgen.models.recorded.signature import PipelineSignature, present_class, present_config

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class DescribedFamily(PipelineFamily):
    """A family that its folder's pipeline describes.

    Attributes:
        repository: Where the model is published; only messages name it.
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

    repository: str = "ORG/NAME"
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
        if "num_layers" not in self.transformer_config:
            raise ValueError(
                f"model.path={self.path} holds a {self.transformer_class} without num_layers, by which models are "
                "planned"
            )
        _ = self.objective, self.condition_shape  # whatever is not supported is refused now
        own = [
            model.name for model in known_models() if model.kind["the transformer's class"] == self.transformer_class
        ]
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
                        f"model.{key} is not given, and a {self.signature.name} has no default for it; write model.{key}=..."
                    )
                setattr(self, key, float(value) if key == "guidance_scale" else value)
        if self.num_frames is None:
            self.num_frames = self.sampling_frames
        if frames is not None and self.sampling_frames == 1 < self.num_frames:
            raise ValueError(
                f"model.sampling_frames=1 beside model.num_frames={self.num_frames}: the frames of the VAE are found by a "
                "sampled video; write model.sampling_frames above 1"
            )
        for key in ("num_frames", "sampling_frames"):
            if frames is None and (value := getattr(self, key)) != 1:
                raise ValueError(f"model.{key}={value}, and a {self.signature.name} makes images; write 1")

    def _check_kind(self, given: str) -> None:
        """Any pipeline that :class:`~qvgen.models.recorded.signature.PipelineSignature` takes is of the right kind."""

    # What the folder says

    @property
    def pipeline_class(self) -> str:  # type: ignore[override]
        """Class of the pipeline."""
        return self.signature.name

    @property
    def transformer_class(self) -> str:  # type: ignore[override]
        """Class of the transformer."""
        return present_class(self.signature.transformer, self.component_config("transformer"))

    @cached_property
    def transformer_config(self) -> dict[str, Any]:
        """The configuration that :meth:`build` takes to build the model's transformer."""
        return present_config(self.signature.transformer, self.component_config("transformer"))

    def _load_transformer(self, folder: str, *, dtype: torch.dtype) -> nn.Module:
        """Load the transformer; one of an earlier class by that name."""
        if self._finetune is not None or self.signature.transformer == self.transformer_class:
            return super()._load_transformer(folder, dtype=dtype)
        kind = getattr(diffusers, self.signature.transformer)
        transformer: Any = self._require_folder().load(folder, kind, dtype=dtype)
        own = {key: value for key, value in transformer.config.items() if key in self.transformer_config}
        transformer._internal_dict = FrozenDict(own)  # diffusers keeps the earlier class's arguments there
        merge_loras_(transformer, self._loras, component=folder)
        return transformer

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
            raise ValueError(
                f"model.path={self.path} has the scheduler {name}; model=diffusers knows {', '.join(SCHEDULERS)}"
            )
        return getattr(diffusers, name).from_config(config)

    @cached_property
    def objective(self) -> Objective:
        """The formula that the folder's scheduler undoes; raises ValueError for one that is not known."""
        formula = objective_of(self.scheduler(), name=f"model.path={self.path}", mu=self.measured.mu)
        return drawn_objective(formula, self)

    def _lay_out(self, scheduler: Any, num_steps: int) -> None:
        scheduler.timesteps = self.recorded.visited(num_steps)

    def _told(self, timestep: float) -> float:
        return float(torch.tensor(timestep).to(self._told_dtype))

    @cached_property
    def _told_dtype(self) -> torch.dtype:
        """Type in which the pipeline tells a transformer of the teacher's dtype its timesteps; whole numbers are as given."""
        dtype = getattr(torch, self.dtype)
        given = self._prompt_arguments(self._typed(self.recorded.encoded, dtype=dtype), None)
        outline = self.recorded.outline(dtype, torch.device("cpu"))
        call = self.recorded.record(given, self.recorded.size, until="call", outline=outline).calls[0]
        found: torch.dtype = call[self.measured.timestep].dtype
        return found if found.is_floating_point else torch.float32

    def _typed(self, condition: Mapping[str, Tensor], *, dtype: torch.dtype) -> dict[str, Tensor]:
        """Conditions in the types that ``encode_prompt`` returns: embeddings in the transformer's, masks of whole numbers."""
        kinds = {name: value.dtype for name, value in self.recorded.encoded.items()}
        return {name: condition[name].to(dtype if kind.is_floating_point else kind) for name, kind in kinds.items()}

    # What its pipeline does

    @property
    def measured(self) -> Measured:
        """Facts about the pipeline's latents and calls, at the size of a sampled video."""
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
        temporal = 1 if frames == 1 else (self.sampling_frames - 1) // (frames - 1)
        return temporal, self.height // self.measured.shape[2]

    @property
    def patch_size(self) -> int:
        """Latent pixels along a side of a token, where the transformer's configuration says so."""
        size = self.transformer_config.get("patch_size") or 1
        return int(size if isinstance(size, int) else size[-1])

    def check_clip(self, *, frames: int, height: int, width: int) -> None:
        """Raise ValueError for a size that VAE and patches do not divide, or more than one frame of an image."""
        if self.measured.is_image and frames != 1:
            raise ValueError(
                f"a clip of {frames}x{height}x{width} does not fit a {self.pipeline_class}, which makes images"
            )
        super().check_clip(frames=frames, height=height, width=width)
