"""A family over a diffusers model in a local folder: its configurations, its transformer, and loading its other parts.

Where no folder is given, the configurations that were published (conf/model/NAME.yaml, ``published``) stand in for the
folder's, so that a run can be planned before anything is downloaded; whatever needs weights raises then. Once there is a
folder its own configurations count.

Classes of parts are named, and imported with the part. What is done with them is :mod:`qvgen.models.pipeline_family`'s.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import torch
from torch import nn

from qvgen.config.schema.may_differ import MayDiffer
from qvgen.models.clip_size import check_sizes
from qvgen.models.finetune.place import find_finetune
from qvgen.models.folder.hub_cache import cached_snapshot
from qvgen.models.folder.hub_folder import HubFolder, download_remedy
from qvgen.models.folder.identity import settings_identity, weights_identity
from qvgen.models.folder.model_class import model_class
from qvgen.models.folder.published import check_is_known, check_is_of
from qvgen.models.folder.transformer_build import build_transformer
from qvgen.models.guidance import GUIDANCE, NUM_STEPS, check_negative_prompt, require_number
from qvgen.models.lora.merge import Lora, merge_loras_, read_loras

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(kw_only=True, eq=False)
class FolderFamily(abc.ABC):
    """The part of a family that loads.

    Attributes:
        name: Name of the model, as in ``model=NAME``.
        repository: Where the model is published: ORG/NAME on the hub.
        path: Folder that the model was downloaded to, or ORG/NAME in the hub's cache; None plans a run without weights.
        published: Configuration of each component as published, by which a run is planned while there is no folder.
        height: Height of a frame in pixels, in training and sampling.
        width: Width of a frame in pixels, in training and sampling.
        num_frames: Frames of a clip in training.
        sampling_frames: Frames of a video that is sampled.
        fps: Frames per second.
        num_inference_steps: Sampling steps of a video.
        guidance_scale: Factor of classifier-free guidance; 1 is none.
        negative_prompt: The caption that guidance leads away from; "" is the empty one.
        include: Name patterns (fnmatch) of the Linears that are quantized.
        exclude: Name patterns (fnmatch) of Linears that stay as they are.
        prompts: Captions that a report samples videos of.
        dtype: Precision of the teacher in training: float32, bfloat16 or float16; the student's masters are float32.
        vae_dtype: Precision of the VAE: float32, bfloat16 or float16.
        text_encoder_dtype: Precision of the text encoder: float32, bfloat16 or float16; its output is float32.
        lora: File or folder of a LoRA that is merged before anything is quantized, a mapping of path and scale, or a list of
            these (:mod:`qvgen.models.lora`). None: none.
        transformer: A finetune of the transformer alone, in place of the folder's: its folder, or one .safetensors file, also
            with the names of Wan's own code (:mod:`qvgen.models.finetune`). None: the folder's.
        lora_scale: Factor of each LoRA that says none, or a list with one for each.

    Raises:
        ValueError: Sizes that VAE and patches do not divide, an unknown dtype, no such model in the folder, a bad LoRA.
    """

    name: str
    repository: str
    published: Mapping[str, Mapping[str, Any]]
    height: int
    width: int
    num_frames: int
    sampling_frames: int
    fps: int
    num_inference_steps: Annotated[int, NUM_STEPS]
    guidance_scale: Annotated[float, GUIDANCE]
    include: list[str]
    exclude: list[str]
    prompts: list[str]
    dtype: str
    vae_dtype: str
    text_encoder_dtype: str
    path: Annotated[str | Path | None, MayDiffer.FREE] = None
    transformer: Annotated[str | Path | None, MayDiffer.FREE] = None
    lora: Annotated[Any, MayDiffer.FREE] = None
    lora_scale: Any = 1.0
    negative_prompt: str = ""

    pipeline_class: ClassVar[str]
    folder_class: ClassVar[type[HubFolder]] = HubFolder
    transformer_class: ClassVar[str]
    transformer_folder: ClassVar[str] = "transformer"
    transformer_folders: ClassVar[tuple[str, ...]] = ("transformer",)
    vae_class: ClassVar[str]
    text_encoder_class: ClassVar[str]
    further_text_encoders: ClassVar[Mapping[str, str]] = {}
    """Folder -> class of transformers, of text encoders besides ``text_encoder``; each has a tokenizer of its own."""

    _device: torch.device = field(default=torch.device("cpu"), init=False, repr=False)
    _loaded: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for key in ("dtype", "vae_dtype", "text_encoder_dtype"):
            if getattr(self, key) not in _DTYPES:
                raise ValueError(f"model.{key}={getattr(self, key)} is not among {', '.join(_DTYPES)}")
        check_negative_prompt(self.negative_prompt)
        require_number("num_inference_steps", self.num_inference_steps, NUM_STEPS, whole=True)
        require_number("guidance_scale", self.guidance_scale, GUIDANCE)
        named = {"repository": self.repository, "model": self.name}
        self._finetune = None if self.transformer is None else find_finetune(self.transformer, **named)
        place = self.path
        if place is None and self._finetune is not None:  # what it lacks is the base model's, where it was downloaded
            place = cached_snapshot(self.repository)
        self.folder = None if place is None else self.folder_class.find(place, **named)
        self._loras = self._chosen_loras()
        if self.folder is not None or self._finetune is not None:
            self._check_kind(f"model.{'transformer' if self._finetune else 'path'}={self.transformer or self.path}")
        temporal, spatial = self.compression
        check_sizes(self, temporal=temporal, multiple=spatial * self.patch_size)

    def _check_kind(self, given: str) -> None:
        """Raise ValueError where the configurations are of another model; ``given`` is how the user named them."""
        check_is_known(self.component_config, name=self.name, given=given)
        of = {"transformer_class": self.transformer_class, "text_encoder": self.text_encoder_class, "given": given}
        check_is_of(self.component_config, name=self.name, **of)

    # The answers of a folder, or of the published configuration

    def component_config(self, component: str) -> dict[str, Any]:
        """A component's configuration, the folder's if there is one.

        Args:
            component: transformer, vae, scheduler, guider or model_index.

        Raises:
            ValueError: the folder lacks it.
        """
        found = dict(self.published.get(component, {})) if self.folder is None else self.folder.read_config(component)
        if self._finetune is not None and component == "transformer":
            return self._finetune.config(found)
        return found

    @cached_property
    def transformer_config(self) -> dict[str, Any]:
        """The configuration that :meth:`build` takes to build the model's transformer."""
        config = self.component_config("transformer")
        return {key: value for key, value in config.items() if not key.startswith("_")}

    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        return self.component_config("vae")

    @property
    @abc.abstractmethod
    def compression(self) -> tuple[int, int]:
        """Frames per latent frame (but the first) and pixels per latent pixel of the VAE."""

    @property
    @abc.abstractmethod
    def patch_size(self) -> int:
        """Latent pixels along a side of a token."""

    def frame_padding(self, num_frames: int) -> int:
        """Latent frames that are put in front of a clip's own, so that the patches divide them."""
        del num_frames
        return 0

    @property
    def sample_shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W) of a training clip's latents."""
        temporal, spatial = self.compression
        frames = self.frame_padding(self.num_frames) + (self.num_frames - 1) // temporal + 1
        return (self.latent_channels, frames, self.height // spatial, self.width // spatial)

    @property
    def latent_channels(self) -> int:
        """Channels of a sample: all of the transformer's inputs, where no image is among them."""
        return int(self.transformer_config.get("in_channels", 16))  # 16 is both classes' default

    @cached_property
    def revision(self) -> str:
        """Content key of the transformer's weights: the folder's, see :mod:`qvgen.models.folder`, LoRAs and their scales.

        Raises:
            ValueError: there are none.
        """
        revision = self.component_revision(self.transformer_folder)
        if not self._loras:
            return revision
        return hashlib.sha256(" ".join([revision, *(lora.revision for lora in self._loras)]).encode()).hexdigest()

    def identity(self, *, transformer_only: bool = False) -> dict[str, str]:
        """Checksums of all that the folder holds and of the LoRA; see :meth:`qvgen.models.base.VideoDiT.identity`."""
        if self.folder is None and self._finetune is None:
            return {}
        chosen = ", ".join(lora.revision.replace(" ", " times ", 1) for lora in self._loras)
        own = {"lora": chosen} if chosen else {}
        others = ("vae", *self.encoders)
        names = [self.transformer_folder] if transformer_only else [*self.transformer_folders, *others]
        if self._finetune is not None:
            names.remove(self.transformer_folder)
            own[self.transformer_folder] = self._finetune.checksum
        if self.folder is None:
            return own
        settings = {} if transformer_only else settings_identity(self.folder)
        return {**weights_identity(self.folder, names), **settings, **own}

    def component_revision(self, component: str) -> str:
        """Content key of the folder's weights of transformer, vae or text_encoder; raises ValueError without them."""
        if self._finetune is not None and component == self.transformer_folder:
            return self._finetune.revision
        return self._require_folder().revision(component)

    def load_teacher(self, *, dtype: torch.dtype | None = None) -> nn.Module:
        """Load the trained transformer; see :meth:`qvgen.models.base.VideoDiT.load_teacher`.

        Raises:
            ValueError: the weights or the LoRA are missing, damaged or of another model.
        """
        return self._load_transformer(self.transformer_folder, dtype=dtype or _DTYPES[self.dtype])

    def _load_transformer(self, folder: str, *, dtype: torch.dtype) -> nn.Module:
        """Load one of the model's transformers, with its LoRA if there is one."""
        if self._finetune is not None and folder == self.transformer_folder:
            transformer = self._finetune.load(self.transformer_class, self.transformer_config, dtype=dtype)
        else:
            transformer = self._require_folder().load(folder, model_class(self.transformer_class), dtype=dtype)
        merge_loras_(transformer, self._loras, component=folder)
        return transformer

    @property
    def lora_record(self) -> list[dict[str, Any]]:
        """The LoRAs as a manifest has them: content and scale of each, and its transformers; no paths."""
        return [
            {"sha256": lora.file.revision, "scale": lora.scale, "transformers": sorted(lora.keys)}
            for lora in self._loras
        ]

    def check_transformer(self, transformer: nn.Module) -> None:
        """Find out in seconds whether the transformers of the folder are there and whole, and the LoRAs of this model.

        Args:
            transformer: one that :meth:`build` made, on ``meta`` for example.

        Raises:
            ValueError: weights are missing, cut off or quantized already, or of another model, as a LoRA may be.
        """
        of_folder = list(self.transformer_folders)
        if self._finetune is not None:
            of_folder.remove(self.transformer_folder)
            self._finetune.check(self.transformer_class, self.transformer_config)
        if self.folder is not None:
            self.folder.check_parts(of_folder)
        for lora in self._loras:
            lora.plan(transformer, component=self.transformer_folder)

    def _chosen_loras(self) -> list[Lora]:
        """The LoRAs of the configuration, their keys read."""
        return read_loras(
            self.lora, scale=self.lora_scale, components=self.transformer_folders, trained=self.transformer_folder
        )

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """Build a transformer; see :func:`qvgen.models.folder.transformer_build.build_transformer`."""
        return build_transformer(self.transformer_class, config)

    def to(self, device: torch.device | str) -> Self:
        """Choose where text encoder and VAE run; they are moved when they are next used."""
        self._device = torch.device(device)
        return self

    def release(self) -> None:
        """Forget text encoder, tokenizer and VAE and free their memory; they are loaded again when needed."""
        self._loaded.clear()

    def _require_folder(self) -> HubFolder:
        if self.folder is None:
            raise ValueError(
                f"model={self.name} needs its weights: {download_remedy(self.repository, model=self.name)}"
            )
        return self.folder

    @property
    def text_encoders(self) -> dict[str, str]:
        """Folder -> class of transformers, of all text encoders; their dtype is ``text_encoder_dtype``."""
        return {"text_encoder": self.text_encoder_class, **self.further_text_encoders}

    @property
    def encoders(self) -> dict[str, str]:
        """Folder -> class of transformers, of all parts that encode what a video is made from."""
        return self.text_encoders
