"""HunyuanVideo 1.5, text to video (arXiv 2511.18870); from an image: :mod:`qvgen.models.hunyuan_image`.

    transformer   HunyuanVideo15Transformer3DModel; latents as [B, C, F, H, W]. 54 blocks have a stream for video and one for
                  text; a token refiner of two blocks reads Qwen's text before them
    input         cat of latents, latents of an image and its mask along the channels (32 + 32 + 1); the last two, and the 729
                  tokens of an image encoder, are zeros in text to video. A model that sees nothing but zeros among these
                  tokens leaves them out of its attention
    text          the last hidden states but two of Qwen2.5-VL behind the authors' template, whose 108 tokens are cut off
                  again (1000 are left); ByT5's of what stands in quotation marks, which the video shows in letters (256
                  bytes, zeros where there is none). Each has a mask of its own
    timestep      rounded in ``dtype`` for teacher and student, as the pipeline rounds it
    guidance      classifier-free, by the pipeline's guider

Objective and latents are those of :mod:`qvgen.models.hunyuan_family`.

Where a smoothing vector m disappears (:mod:`qvgen.models.hunyuan_fold`):

    attn.to_q, to_k, to_v             <- norm1
    attn.add_q_proj, add_k_, add_v_   <- norm1_context
    ff, ff_context, their first       <- norm1, norm1_context: the shift and scale of the feed-forward net
    proj_out                          <- norm_out
    refiner: to_q, to_k, to_v; ff     <- norm1; norm2
    refiner: to_out                   <- to_v
    linear_1 of ByT5's and the image's embedders <- their norms

Where it stays a multiplication: behind a GELU or SiLU (the second Linear of a feed-forward net, modulations, embedders), and
attn.to_out.0 and to_add_out, which read the video's and the text's tokens of one attention.

Left out: super-resolution, which is refused; packed blocks with fused norms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qvgen.layers.smoothing_fold import Producer, SmoothingFold
from qvgen.models.hunyuan_family import HunyuanFamily
from qvgen.models.hunyuan_fold import behind, double_folds, refiner_folds
from qvgen.models.hunyuan_image import HunyuanEmbeddedImage
from qvgen.models.original.names import HUNYUAN_VIDEO_15_ORIGINAL_NAMES, OriginalNames

_IMAGE_TOKENS = 729
_LETTER_TOKENS = 256
_GUIDER = "ClassifierFreeGuidance"
_PLAIN_GUIDER = {"guidance_rescale": 0.0, "use_original_formulation": False, "start": 0.0, "stop": 1.0, "enabled": True}


@dataclass(kw_only=True, eq=False)
class HunyuanVideo15(HunyuanFamily):
    """The HunyuanVideo 1.5 family; its keys are those of :class:`qvgen.models.hunyuan_family.HunyuanFamily`.

    Raises:
        ValueError: A super-resolution model, or guidance for weights in which it is distilled.
    """

    transformer_class: ClassVar[str] = "HunyuanVideo15Transformer3DModel"
    pipeline_class: ClassVar[str] = "HunyuanVideo15Pipeline"
    vae_class: ClassVar[str] = "AutoencoderKLHunyuanVideo15"
    text_encoder_class: ClassVar[str] = "Qwen2_5_VLTextModel"
    further_text_encoders: ClassVar[Mapping[str, str]] = {"text_encoder_2": "T5EncoderModel"}
    max_text_tokens: ClassVar[int] = 1000
    condition_arguments: ClassVar[Mapping[str, str]] = {
        "encoder_hidden_states": "prompt_embeds",
        "encoder_attention_mask": "prompt_embeds_mask",
        "encoder_hidden_states_2": "prompt_embeds_2",
        "encoder_attention_mask_2": "prompt_embeds_mask_2",
    }
    layer_groups: ClassVar[Mapping[str, Sequence[str]]] = {
        "self_attention": ("transformer_blocks.*.attn.*", "*refiner_blocks.*.attn.*"),  # text, space and time at once
        "ffn": ("transformer_blocks.*.ff.*", "transformer_blocks.*.ff_context.*", "*refiner_blocks.*.ff.*"),
    }
    original_names: ClassVar[OriginalNames] = HUNYUAN_VIDEO_15_ORIGINAL_NAMES

    _task: ClassVar[str] = "a text-to-video"

    def __post_init__(self) -> None:
        super().__post_init__()
        config = self.transformer_config
        wanted = 2 * self.latent_channels + 1
        if config.get("in_channels", 65) != wanted or config.get("use_meanflow"):
            raise ValueError(
                f"model={self.name} takes {wanted} channels and one timestep, and this transformer "
                f"in_channels={config.get('in_channels', 65)} and use_meanflow={config.get('use_meanflow', False)}, as "
                f"super-resolution does; use {self._task} transformer"
            )
        told = self._guider_config().get("guidance_scale")
        if told == 1 and self.guidance_scale > 1:
            raise ValueError(
                f"model.guidance_scale={self.guidance_scale} does not fit weights in which guidance is distilled "
                "(guidance_scale=1.0 of their guider); write model.guidance_scale=1.0"
            )

    def _told(self, timestep: float) -> float:
        return float(torch.tensor(timestep).to(getattr(torch, self.dtype)))  # as predict and the pipeline round it

    @property
    def latent_channels(self) -> int:
        """Channels of a sample, which are the VAE's."""
        return int(self._vae_config.get("latent_channels", 32))  # the class's default, as those below

    @property
    def patch_size(self) -> int:
        """Latent pixels along a side of a token."""
        return int(self.transformer_config.get("patch_size", 1))

    @property
    def condition_shape(self) -> tuple[int, int]:
        """(1000, text_embed_dim): tokens and channels of a caption's embedding."""
        return (self.max_text_tokens, int(self.transformer_config.get("text_embed_dim", 3584)))

    @property
    def further_condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the mask of a caption's tokens, 1 where one is, of the embedding of its letters and of their mask."""
        letters = int(self.transformer_config.get("text_embed_2_dim", 1472))
        return {
            "encoder_attention_mask": (self.max_text_tokens,),
            "encoder_hidden_states_2": (_LETTER_TOKENS, letters),
            "encoder_attention_mask_2": (_LETTER_TOKENS,),
        }

    def check_sampling_parts(self) -> None:
        """Find out whether what texts and videos need is there; see the base class.

        Raises:
            ValueError: something is missing, or the guider is another one than plain classifier-free guidance.
        """
        super().check_sampling_parts()
        if self.folder is not None:
            self._check_guider()

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Run both text encoders as the pipeline does, each caption alone: an embedding has no batch mates.

        Returns:
            Tensors of ``condition_arguments``, float32 [B, 1000, D], [B, 1000], [B, 256, E] and [B, 256], where :meth:`to`
            says.

        Raises:
            ValueError: tokenizer or weights are missing.
        """
        pipeline: Any = self._pipeline_type()
        first = {"text_encoder": self._module("text_encoder"), "tokenizer": self._tokenizer()}
        second = {"text_encoder": self._module("text_encoder_2"), "tokenizer": self._tokenizer("tokenizer_2")}
        rows = []
        for caption in captions:
            given = {"prompt": caption, "device": self._device}
            text = pipeline._get_mllm_prompt_embeds(**first, **given, tokenizer_max_length=self.max_text_tokens)
            letters = pipeline._get_byt5_prompt_embeds(**second, **given, tokenizer_max_length=_LETTER_TOKENS)
            rows.append((*text, *letters))
        return {
            name: torch.cat([row[place] for row in rows]).float() for place, name in enumerate(self.condition_arguments)
        }

    def smoothing_folds(self, transformer: nn.Module) -> list[SmoothingFold]:
        """The places behind modulations and affine norms; see the head of this file."""
        model: Any = transformer
        width = model.config.num_attention_heads * model.config.attention_head_dim
        folds = list(refiner_folds(len(model.context_embedder.token_refiner.refiner_blocks)))
        for linear, norm in (("context_embedder_2", "norm"), ("image_embedder", "norm_in")):
            rows = (Producer(module=f"{linear}.{norm}"),)
            folds.append(SmoothingFold(consumers=(f"{linear}.linear_1",), producers=rows))
        for index in range(len(model.transformer_blocks)):
            folds += double_folds(f"transformer_blocks.{index}", width=width)
        return [*folds, behind("norm_out.linear", ("proj_out",), shift=width, scale=0)]

    def predict(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "B C F H W"],
        timestep: Float[Tensor, " B"],
        condition: Mapping[str, Tensor],
    ) -> Float[Tensor, "B C F H W"]:
        """Predict the flow's velocity; see :meth:`qvgen.models.base.VideoDiT.predict`."""
        latents = noisy.to(transformer.dtype)
        image, tokens = self._image(latents, condition)
        output: Tensor = transformer(
            hidden_states=torch.cat([latents, image], dim=1),
            timestep=timestep.to(getattr(torch, self.dtype)).to(transformer.dtype),
            **{name: condition[name].to(transformer.dtype) for name in self.condition_arguments},
            image_embeds=tokens,
            return_dict=False,
        )[0]
        return output

    def _image(self, latents: Tensor, condition: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """An image's channels and tokens, here zeros in the latents' dtype: [B, C + 1, F, H, W] and [B, 729, D]."""
        del condition
        count, channels, *sizes = latents.shape
        width = int(self.transformer_config.get("image_embed_dim", 1152))
        return latents.new_zeros(count, channels + 1, *sizes), latents.new_zeros(count, _IMAGE_TOKENS, width)

    def _module(self, component: str, *, device: torch.device | None = None) -> Any:
        module = super()._module(component, device=device)
        if component == "vae":
            module.enable_slicing()  # the mask of its attention fits one clip at once
        return module

    def _pipeline(self, **components: Any) -> Any:
        return super()._pipeline(**{"guider": None, **components})

    def _sampling_parts(self, device: torch.device, guidance_scale: float) -> dict[str, Any]:
        """The parts that run while a video is sampled; a scale of 1 turns the guider off, as one below does elsewhere."""
        self._check_guider()
        import diffusers

        guider = getattr(diffusers, _GUIDER)(guidance_scale=max(1.0, guidance_scale))
        return {**super()._sampling_parts(device, guidance_scale), "guider": guider}

    def _call_options(self, guidance_scale: float) -> dict[str, Any]:
        del guidance_scale  # the guider's
        return {}

    def _guider_config(self) -> dict[str, Any]:
        """The folder's configuration of the guider; empty where it has none."""
        if self.folder is not None and not (self.folder.path / "guider" / "guider_config.json").is_file():
            return {}
        return self.component_config("guider")

    def _check_guider(self) -> None:
        """Raise ValueError unless the guider is plain classifier-free guidance."""
        config = self.component_config("guider")
        for key, value in {"_class_name": _GUIDER, **_PLAIN_GUIDER}.items():
            if config.get(key, value) != value:
                raise ValueError(f"{self.name}'s guider has {key}={config[key]}; {value} is supported")


@dataclass(kw_only=True, eq=False)
class HunyuanVideo15Image(HunyuanEmbeddedImage, HunyuanVideo15):
    """HunyuanVideo 1.5 for images; its keys are those of :class:`HunyuanVideo15`."""

    _task: ClassVar[str] = "an image-to-video"
