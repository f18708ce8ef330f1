"""Open-Sora 1.2, text to video: STDiT3, a transformer of spatial and temporal blocks in turns.

    transformer   :mod:`qvgen.models.stdit3.transformer`; latents as [B, C, F, H, W]. It is told the frames per second
                  (120 of a picture)
    objective     rectified flow. Its output is clean minus noise; here it is turned round, so that the target is noise minus
                  clean as of every flow. Noise levels are shifted by sqrt(height width / 512^2) sqrt(latent frames): more
                  for larger and longer clips, below 1 for small ones; training and sampling alike
    text          T5 v1.1 XXL, 300 tokens with a mask of the caption's own, lower-cased, and what is said of a caption's
                  looks behind it (``caption_suffix``). No caption is an embedding of the checkpoint's own, not T5's of ""
    latents       :mod:`qvgen.models.stdit3.vae`: 17 frames make 5, a picture 1

Source: hpcaitech/Open-Sora (opensora/schedulers/rf, configs/opensora-v1-2/inference/sample.py, opensora/models/text_encoder).

[ours] The dropped caption of training is read whole, all 300 tokens; in sampling it is cut to the caption's number as the
authors do, and so is a negative prompt. The authors' further cleaning of captions needs beautifulsoup4 and is off.

Where smoothing vectors disappear: proj <- the rows of qkv or kv_linear that make values. Where they stay a multiplication:
qkv, mlp.fc1 and final_layer.linear (their modulations are a table plus an output of t_block that all blocks share);
cross_attn.q_linear (it reads the residual stream); cross_attn.kv_linear (the text, one for all blocks); mlp.fc2 (GELU).

Left out: given frames (image to video, longer videos piece by piece), LoRA loaders (there is none for it), one file in place
of the transformer's folder, sequences shared out over processes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qvgen.layers.smoothing_fold import Producer, SmoothingFold
from qvgen.models.base import Objective
from qvgen.models.few_step import drawn_objective
from qvgen.models.folder.hub_folder import HubFolder
from qvgen.models.pipeline_family import PipelineFamily
from qvgen.models.stdit3.configuration import PIXELS, WINDOW, latent_frames
from qvgen.models.stdit3.flow import ResolutionFlow
from qvgen.models.stdit3.folder import OpenSoraFolder, how_to_download
from qvgen.models.stdit3.sampler import OpenSoraSampler, lay_out_steps
from qvgen.models.tensor_reader import read_tensors_of

_SQUARE = 512 * 512
"""Pixels of a picture whose noise levels are not shifted."""
_PICTURE_FPS = 120.0
"""Frames per second that the transformer is told of a picture."""
_NO_CAPTION = "y_embedder.y_embedding"


@dataclass(kw_only=True, eq=False)
class OpenSora(PipelineFamily):
    """The Open-Sora family.

    Attributes:
        caption_suffix: Text behind every caption but the empty one; the authors' training captions end so.

    The other keys are those of :class:`qvgen.models.folder_family.FolderFamily`.

    Raises:
        ValueError: Another number of frames than windows of the VAE have; a finetune that is no folder of its own.
    """

    caption_suffix: str = ""

    folder_class: ClassVar[type[HubFolder]] = OpenSoraFolder
    own_classes: ClassVar[Mapping[str, str]] = {
        "STDiT3": "qvgen.models.stdit3.transformer",
        "VideoAutoencoderPipeline": "qvgen.models.stdit3.vae",
    }
    transformer_class: ClassVar[str] = "STDiT3"
    vae_class: ClassVar[str] = "VideoAutoencoderPipeline"
    text_encoder_class: ClassVar[str] = "T5EncoderModel"
    max_text_tokens: ClassVar[int] = 300
    condition_arguments: ClassVar[Mapping[str, str]] = {
        "encoder_hidden_states": "prompt_embeds",
        "encoder_attention_mask": "prompt_attention_mask",
    }
    layer_groups: ClassVar[Mapping[str, Sequence[str]]] = {
        "cross_attention": ("*_blocks.*.cross_attn.*",),
        "temporal_attention": ("temporal_blocks.*.attn.*",),
        "self_attention": ("spatial_blocks.*.attn.*",),
        "ffn": ("*_blocks.*.mlp.*",),
    }
    shared_inputs: ClassVar[Sequence[Sequence[str]]] = ()  # one Linear makes queries, keys and values

    def __post_init__(self) -> None:
        if self.transformer is not None:
            raise ValueError(
                f"model.transformer={self.transformer}: {self.name} takes a finetune as the folder transformer beside the "
                "other parts; write model.path alone"
            )
        super().__post_init__()
        for key in ("num_frames", "sampling_frames"):
            self._check_frames(getattr(self, key), what=f"model.{key}={getattr(self, key)}")

    # Sizes

    def _check_frames(self, frames: int, *, what: str) -> None:
        window = self._window
        if frames != 1 and (frames < 1 or frames % window):
            nearest = 1 if frames < (window + 1) / 2 else max(1, round(frames / window)) * window
            raise ValueError(
                f"{what} does not fit {self.name}, whose VAE takes windows of {window} frames, or one; use {nearest}"
            )

    @property
    def _window(self) -> int:
        return int(self._vae_config.get("micro_frame_size", WINDOW))

    def check_clip(self, *, frames: int, height: int, width: int) -> None:
        """Raise ValueError for a number of frames or a size that the VAE does not take."""
        self._check_frames(frames, what=f"a clip of {frames}x{height}x{width}")
        super().check_clip(frames=frames, height=height, width=width)

    @property
    def compression(self) -> tuple[int, int]:
        """1, as frames are windows (:meth:`_check_frames`), and pixels per latent pixel."""
        return 1, PIXELS

    @property
    def patch_size(self) -> int:
        """1: the transformer's patches have 2 latent pixels, and it pads what they do not divide."""
        return 1

    @property
    def sample_shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W) of a training clip's latents."""
        frames = latent_frames(self.num_frames, window=self._window)
        return self.latent_channels, frames, self.height // PIXELS, self.width // PIXELS

    @property
    def condition_shape(self) -> tuple[int, int]:
        """(300, caption_channels): tokens and channels of a caption's embedding."""
        return self._text_tokens, int(self.transformer_config["caption_channels"])

    @property
    def further_condition_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The mask of a caption's own tokens."""
        return {"encoder_attention_mask": (self._text_tokens,)}

    @property
    def _text_tokens(self) -> int:
        return int(self.transformer_config["model_max_length"])

    # Flow

    def _shift(self, frames: int) -> float:
        """The shift of noise levels of clips of so many frames: more noise for more pixels and more latents."""
        latents = latent_frames(frames, window=self._window)
        return math.sqrt(self.height * self.width / _SQUARE) * math.sqrt(latents)

    @cached_property
    def objective(self) -> Objective:
        """Rectified flow, with the shift of a training clip, or at a few-step model's timesteps."""
        return drawn_objective(ResolutionFlow(shift=self._shift(self.num_frames)), self)

    def scheduler(self) -> Any:
        """The Euler steps of the authors' sampler, whose noise levels are those of a sampled video's shift."""
        from diffusers import FlowMatchEulerDiscreteScheduler  # seconds, in which a plan of a recorded model is done

        return FlowMatchEulerDiscreteScheduler(shift=self._shift(self.sampling_frames))

    _lay_out = staticmethod(lay_out_steps)

    def predict(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "B C F H W"],
        timestep: Float[Tensor, " B"],
        condition: Mapping[str, Tensor],
    ) -> Float[Tensor, "B C F H W"]:
        """Predict the flow's velocity; see :meth:`qvgen.models.base.VideoDiT.predict`."""
        fps = float(self.fps) if noisy.shape[2] > 1 else _PICTURE_FPS
        output: Tensor = transformer(
            hidden_states=noisy.to(transformer.dtype),
            timestep=timestep,
            encoder_hidden_states=condition["encoder_hidden_states"].to(transformer.dtype),
            encoder_attention_mask=condition["encoder_attention_mask"],
            fps=torch.full_like(timestep, fps),
            return_dict=False,
        )[0]
        return -output[:, : noisy.shape[1]]

    def smoothing_folds(self, transformer: nn.Module) -> list[SmoothingFold]:
        """The places behind values; see the head of this file."""
        folds = []
        model: Any = transformer
        for kind in ("spatial_blocks", "temporal_blocks"):
            for index, block in enumerate(getattr(model, kind)):
                size = block.attn.proj.in_features
                for attention, values, start in (("attn", "qkv", 2 * size), ("cross_attn", "kv_linear", size)):
                    name = f"{kind}.{index}.{attention}"
                    rows = Producer(module=f"{name}.{values}", start=start)
                    folds.append(SmoothingFold(consumers=(f"{name}.proj",), producers=(rows,)))
        return folds

    # Text

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Run the text encoder on each caption alone; the empty one is the checkpoint's own embedding.

        Returns:
            ``encoder_hidden_states`` float32 [B, 300, D]; ``encoder_attention_mask`` [B, 300], 1 at a caption's own tokens.

        Raises:
            ValueError: tokenizer or weights are missing.
        """
        rows = [self._encode_one(text) if text else self._no_caption() for text in captions]
        columns = (torch.cat(part).float() for part in zip(*rows, strict=True))
        return dict(zip(self.condition_arguments, columns, strict=True))

    def _encode_one(self, text: str) -> tuple[Tensor, Tensor]:
        options = {"max_length": self._text_tokens, "padding": "max_length", "truncation": True, "return_tensors": "pt"}
        tokens = self._tokenizer()(self.clean_caption(f"{text}{self.caption_suffix}"), **options)
        mask = tokens.attention_mask.to(self._device)
        return self._module("text_encoder")(tokens.input_ids.to(self._device), attention_mask=mask)[0], mask

    def _no_caption(self) -> tuple[Tensor, Tensor]:
        embedding = self._read_no_caption().to(self._device)[None]
        return embedding, torch.ones(embedding.shape[:2], device=self._device)

    def _read_no_caption(self) -> Tensor:
        folder, part = self._require_folder(), self.transformer_folder
        return read_tensors_of(folder.weight_files(part), remedy=folder.remedy(f"{part}/*"))(_NO_CAPTION)

    @staticmethod
    def clean_caption(caption: str) -> str:
        """A caption as it is tokenized: without the authors' further cleaning."""
        return caption.lower().strip()

    @cached_property
    def text_revision(self) -> str:  # type: ignore[override]
        """Content key of whatever decides :meth:`encode`; see the base class."""
        own = hashlib.sha256(self._read_no_caption().numpy().tobytes()).hexdigest()
        return " ".join([super().text_revision, own, repr(self.caption_suffix)])

    # Latents and videos

    @torch.no_grad()
    def encode_video(self, pixels: Float[Tensor, "B 3 F H W"]) -> Float[Tensor, "B C f h w"]:
        """Turn clips into latents; see :meth:`qvgen.models.base.LatentVideoDiT.encode_video`."""
        frames, height, width = pixels.shape[2:]
        self.check_clip(frames=frames, height=height, width=width)
        vae = self._module("vae")
        latents: Tensor = vae.encode(pixels.to(self._device, vae.dtype))
        return latents.float()

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "B C f h w"], *, num_frames: int | None = None
    ) -> Float[Tensor, "B 3 F H W"]:
        """Turn latents into pixels; see :meth:`qvgen.models.base.LatentVideoDiT.decode`."""
        vae = self._module("vae", device=latents.device)
        pixels: Tensor = vae.decode(latents.to(vae.dtype), num_frames=num_frames or self.num_frames)
        return pixels

    def _normalize(self, latents: Tensor) -> Tensor:
        return latents  # the VAE's own encode and decode do it

    _denormalize = _normalize

    def _pipeline(self, *, transformer: nn.Module, **_: Any) -> OpenSoraSampler:
        channels, _, height, width = self.sample_shape
        shape = (channels, latent_frames(self.sampling_frames, window=self._window), height, width)
        given = {"transformer": transformer, "scheduler": self._sampling_scheduler()}
        return OpenSoraSampler(predict=self.predict, shape=shape, **given)

    def _sizes(self) -> dict[str, int]:
        return {}  # the sampler knows them

    def _prompt_arguments(
        self, condition: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None
    ) -> dict[str, Any]:
        """Both captions; what guidance leads away from is cut to the caption's own tokens."""
        if negative is not None:
            mask = negative["encoder_attention_mask"] * condition["encoder_attention_mask"]
            negative = {**negative, "encoder_attention_mask": mask}
        return {"condition": condition, "negative": negative}

    def _require_folder(self) -> HubFolder:
        if self.folder is None:
            raise ValueError(f"model={self.name} needs its weights: {how_to_download('FOLDER')}")
        return self.folder
