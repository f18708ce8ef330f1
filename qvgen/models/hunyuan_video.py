"""HunyuanVideo, text to video (arXiv 2412.03603).

    transformer   HunyuanVideoTransformer3DModel; latents as [B, C, F, H, W]. 20 blocks have a stream for video and one for
                  text, then 40 have both in one. A token refiner of two blocks reads the text before them; a mask leaves
                  out the places behind a caption's tokens
    text          the last hidden states but two of Llama-3 8B behind the authors' template, whose 95 tokens are cut off again
                  (256 are left), and CLIP's pooled output, which joins the timestep's embedding
    guidance      distilled into the model: teacher and student are told 1000 times ``embedded_guidance``, rounded in
                  ``dtype`` as the pipeline rounds it, so that both get one number. ``guidance_scale`` is classifier-free
                  guidance beside it, which the authors leave at 1

Objective and latents are those of :mod:`qvgen.models.hunyuan_family`.

Where a smoothing vector m disappears (:mod:`qvgen.models.hunyuan_fold`):

    attn.to_q, to_k, to_v             <- norm1, in a single block norm, together with proj_mlp
    attn.add_q_proj, add_k_, add_v_   <- norm1_context
    ff, ff_context, their first       <- norm1, norm1_context: the shift and scale of the feed-forward net
    proj_out                          <- norm_out
    refiner: to_q, to_k, to_v; ff     <- norm1; norm2
    refiner: to_out                   <- to_v

Where it stays a multiplication: behind a GELU or SiLU (the second Linear of a feed-forward net, modulations, embedders), and

    attn.to_out.0, to_add_out   they read the video's and the text's tokens of one attention, whose values come from to_v and
                                add_v_proj together: one m for both would have to be chosen from the tokens of one of them
    single proj_out             reads the attention's output beside the MLP's, which stands behind a GELU

Left out: image to video (``image_condition_type``), packed blocks with fused norms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qvgen.layers.smoothing_fold import SmoothingFold
from qvgen.models.guidance import GUIDANCE, require_number
from qvgen.models.hunyuan_family import HunyuanFamily
from qvgen.models.hunyuan_fold import VIDEO, behind, double_folds, refiner_folds
from qvgen.models.original.names import HUNYUAN_VIDEO_ORIGINAL_NAMES, OriginalNames


@dataclass(kw_only=True, eq=False)
class HunyuanVideo(HunyuanFamily):
    """The HunyuanVideo family.

    Attributes:
        embedded_guidance: Guidance that the transformer is told, in training and sampling; null for weights that were not
            distilled with it (``guidance_embeds: false`` of their configuration), which need ``guidance_scale``.

    The other keys are those of :class:`qvgen.models.hunyuan_family.HunyuanFamily`.

    Raises:
        ValueError: another guidance, or one that the transformer is not told.
    """

    embedded_guidance: Annotated[float | None, GUIDANCE] = 6.0

    transformer_class: ClassVar[str] = "HunyuanVideoTransformer3DModel"
    pipeline_class: ClassVar[str] = "HunyuanVideoPipeline"
    vae_class: ClassVar[str] = "AutoencoderKLHunyuanVideo"
    text_encoder_class: ClassVar[str] = "LlamaModel"
    further_text_encoders: ClassVar[Mapping[str, str]] = {"text_encoder_2": "CLIPTextModel"}
    max_text_tokens: ClassVar[int] = 256
    condition_arguments: ClassVar[Mapping[str, str]] = {
        "encoder_hidden_states": "prompt_embeds",
        "pooled_projections": "pooled_prompt_embeds",
        "encoder_attention_mask": "prompt_attention_mask",
    }
    encode_options: ClassVar[Mapping[str, Any]] = {}
    layer_groups: ClassVar[Mapping[str, Sequence[str]]] = {
        "self_attention": ("*transformer_blocks.*.attn.*", "*refiner_blocks.*.attn.*"),  # text, space and time at once
        "ffn": (
            "transformer_blocks.*.ff.*",
            "transformer_blocks.*.ff_context.*",
            "single_transformer_blocks.*.proj_mlp",
            "single_transformer_blocks.*.proj_out",  # four fifths of its inputs are the MLP's
            "*refiner_blocks.*.ff.*",
        ),
    }
    original_names: ClassVar[OriginalNames] = HUNYUAN_VIDEO_ORIGINAL_NAMES

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embedded_guidance is not None:
            require_number("embedded_guidance", self.embedded_guidance, GUIDANCE)
        is_told = bool(self.transformer_config.get("guidance_embeds", True))  # the class's default
        if is_told != (self.embedded_guidance is not None):
            remedy = "6.0, the authors'" if is_told else "null, and model.guidance_scale above 1 for guidance"
            raise ValueError(
                f"model.embedded_guidance={self.embedded_guidance} does not fit a transformer with guidance_embeds="
                f"{is_told}; write {remedy}"
            )

    @property
    def patch_size(self) -> int:
        """Latent pixels along a side of a token."""
        return int(self.transformer_config.get("patch_size", 2))  # the class's default, as those below

    @property
    def condition_shape(self) -> tuple[int, int]:
        """(256, text_embed_dim): tokens and channels of a caption's embedding."""
        return (self.max_text_tokens, int(self.transformer_config.get("text_embed_dim", 4096)))

    @property
    def further_condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a caption's pooled embedding and of the mask of its tokens, 1 where one is."""
        pooled = int(self.transformer_config.get("pooled_projection_dim", 768))
        return {"pooled_projections": (pooled,), "encoder_attention_mask": (self.max_text_tokens,)}

    def tokens_left_out(self, caption: str) -> int:
        """How many of a caption's tokens are beyond the 256 that stay behind the template; of CLIP's 77 it does not tell.

        Raises:
            ValueError: the tokenizer is missing.
        """
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE as TEMPLATE

        tokens = self._tokenizer()(TEMPLATE["template"].format(caption), verbose=False).input_ids
        return max(0, len(tokens) - TEMPLATE["crop_start"] - self.max_text_tokens)

    def smoothing_folds(self, transformer: nn.Module) -> list[SmoothingFold]:
        """The places behind modulations and the refiner's norms; see the head of this file."""
        model: Any = transformer
        width = model.config.num_attention_heads * model.config.attention_head_dim
        folds = list(refiner_folds(len(model.context_embedder.token_refiner.refiner_blocks)))
        for index in range(len(model.transformer_blocks)):
            folds += double_folds(f"transformer_blocks.{index}", width=width)
        for index in range(len(model.single_transformer_blocks)):
            name = f"single_transformer_blocks.{index}"
            readers = tuple(f"{name}.{part}" for part in (*VIDEO, "proj_mlp"))
            folds.append(behind(f"{name}.norm.linear", readers, shift=0, scale=width))
        return [*folds, behind("norm_out.linear", ("proj_out",), shift=width, scale=0)]

    def predict(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "B C F H W"],
        timestep: Float[Tensor, " B"],
        condition: Mapping[str, Tensor],
    ) -> Float[Tensor, "B C F H W"]:
        """Predict the flow's velocity; see :meth:`qvgen.models.base.VideoDiT.predict`."""
        guidance = None
        if self.embedded_guidance is not None:
            like = {"dtype": getattr(torch, self.dtype), "device": noisy.device}
            guidance = torch.full(timestep.shape, self.embedded_guidance, **like) * 1000.0
        output: Tensor = transformer(
            hidden_states=noisy.to(transformer.dtype),
            timestep=timestep,
            **{name: condition[name].to(transformer.dtype) for name in self.condition_arguments},
            guidance=guidance,
            return_dict=False,
        )[0]
        return output

    def _call_options(self, guidance_scale: float) -> dict[str, Any]:
        embedded = {} if self.embedded_guidance is None else {"guidance_scale": self.embedded_guidance}
        return {"true_cfg_scale": guidance_scale, **embedded}
