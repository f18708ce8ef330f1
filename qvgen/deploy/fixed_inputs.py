"""Small fixed inputs of a transformer, by which two forms of the same weights are compared without a family or a clip.

    latents [1, C, F, H, W] of two patches in time (Latte: as many as it has positions for) and 2 x 4 in space, normal; a
    caption of eight tokens, normal; one timestep

They are drawn on the CPU from a fixed seed, so that a report can be made again. Only the classes of our families are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

SEED = 20_240_501
NUM_PATCHES = (2, 2, 4)
"""Patches in time, height and width."""
NUM_TEXT_TOKENS = 8
WAN_TEXT_TOKENS = 512
"""Tokens of a caption in a WanTransformer3DModel that is given an image."""


def fixed_inputs(transformer: nn.Module, *, timestep: float) -> dict[str, Tensor] | None:
    """Make the arguments of a call, float32; None for a transformer that is not of a kind that is known here.

    Args:
        transformer: One of diffusers, with its ``config``.
        timestep: In [0, 1000].
    """
    make = _INPUTS.get(type(transformer).__name__)
    config: Mapping[str, Any] = getattr(transformer, "config", {})
    return None if make is None else make(config, timestep, torch.Generator().manual_seed(SEED))


def call_fixed(transformer: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The output for :func:`fixed_inputs`, of a call with a caption where a model has other clips for those without."""
    with transformer.cache_context("cond"):  # type: ignore[operator]
        output: Tensor = transformer(**inputs, return_dict=False)[0]
    return output


def _wan(config: Mapping[str, Any], timestep: float, generator: torch.Generator) -> dict[str, Tensor] | None:
    has_image = config.get("image_dim") is not None
    tokens = (
        WAN_TEXT_TOKENS if has_image else NUM_TEXT_TOKENS
    )  # its attention tells image and text apart by this number
    sizes = [count * size for count, size in zip(NUM_PATCHES, config["patch_size"], strict=True)]
    return {
        "hidden_states": torch.randn(1, config["in_channels"], *sizes, generator=generator),
        "timestep": torch.tensor([timestep]),
        "encoder_hidden_states": torch.randn(1, tokens, config["text_dim"], generator=generator),
        **({"encoder_hidden_states_image": _image(config, generator)} if has_image else {}),
    }


def _image(config: Mapping[str, Any], generator: torch.Generator) -> Tensor:
    """Tokens of an image encoder; two images' where the model has positions for both."""
    tokens = config.get("pos_embed_seq_len") or NUM_TEXT_TOKENS
    return torch.randn(1, tokens, config["image_dim"], generator=generator)


def _cogvideox(config: Mapping[str, Any], timestep: float, generator: torch.Generator) -> dict[str, Tensor] | None:
    frames, height, width = NUM_PATCHES
    if config.get(
        "use_learned_positional_embeddings"
    ):  # for one size alone, whose call would take as long as a video's step
        return None
    told = {"ofs": torch.tensor([2.0])} if config.get("ofs_embed_dim") else {}
    channels, patch, patch_t = config["in_channels"], config["patch_size"], config.get("patch_size_t") or 1
    tokens = config["max_text_seq_length"]  # positions of a caption are added to this many tokens
    return {
        "hidden_states": torch.randn(1, frames * patch_t, channels, height * patch, width * patch, generator=generator),
        "encoder_hidden_states": torch.randn(1, tokens, config["text_embed_dim"], generator=generator),
        "timestep": torch.tensor([timestep]),
        **told,
    }


def _ltx(config: Mapping[str, Any], timestep: float, generator: torch.Generator) -> dict[str, Tensor]:
    tokens = math.prod(NUM_PATCHES)
    axes = [torch.arange(float(size)) for size in NUM_PATCHES]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
    return {
        "hidden_states": torch.randn(1, tokens, config["in_channels"], generator=generator),
        "encoder_hidden_states": torch.randn(1, NUM_TEXT_TOKENS, config["caption_channels"], generator=generator),
        "encoder_attention_mask": torch.ones(1, NUM_TEXT_TOKENS),
        "timestep": torch.tensor([timestep]),
        "video_coords": (places * torch.tensor([[0.32], [32.0], [32.0]]))[
            None
        ],  # seconds at 25 frames of 8, and pixels
    }


def _hunyuan_video(config: Mapping[str, Any], timestep: float, generator: torch.Generator) -> dict[str, Tensor]:
    patches = (config["patch_size_t"], config["patch_size"], config["patch_size"])
    sizes = [count * size for count, size in zip(NUM_PATCHES, patches, strict=True)]
    told = {"guidance": torch.tensor([6000.0])} if config["guidance_embeds"] else {}
    return {
        "hidden_states": torch.randn(1, config["in_channels"], *sizes, generator=generator),
        "timestep": torch.tensor([timestep]),
        "encoder_hidden_states": torch.randn(1, NUM_TEXT_TOKENS, config["text_embed_dim"], generator=generator),
        "encoder_attention_mask": torch.ones(1, NUM_TEXT_TOKENS),
        "pooled_projections": torch.randn(1, config["pooled_projection_dim"], generator=generator),
        **told,
    }


def _hunyuan_video_15(config: Mapping[str, Any], timestep: float, generator: torch.Generator) -> dict[str, Tensor]:
    patches = (config["patch_size_t"], config["patch_size"], config["patch_size"])
    sizes = [count * size for count, size in zip(NUM_PATCHES, patches, strict=True)]

    def image(*shape: int) -> Tensor:
        """Channels or tokens of an image, which are zeros in text to video."""
        is_told = config.get("task_type") == "i2v"
        return torch.randn(*shape, generator=generator) if is_told else torch.zeros(*shape)

    latents = torch.randn(1, config["out_channels"], *sizes, generator=generator)
    channels = config["in_channels"] - config["out_channels"]
    return {
        "hidden_states": torch.cat([latents, image(1, channels, *sizes)], dim=1),
        "timestep": torch.tensor([timestep]),
        "encoder_hidden_states": torch.randn(1, NUM_TEXT_TOKENS, config["text_embed_dim"], generator=generator),
        "encoder_attention_mask": torch.ones(1, NUM_TEXT_TOKENS),
        "encoder_hidden_states_2": torch.randn(1, NUM_TEXT_TOKENS, config["text_embed_2_dim"], generator=generator),
        "encoder_attention_mask_2": torch.ones(1, NUM_TEXT_TOKENS),
        "image_embeds": image(1, NUM_TEXT_TOKENS, config["image_embed_dim"]),
    }


def _latte(config: Mapping[str, Any], timestep: float, generator: torch.Generator) -> dict[str, Tensor]:
    _, height, width = NUM_PATCHES
    sizes = config["video_length"], height * config["patch_size"], width * config["patch_size"]
    return {
        "hidden_states": torch.randn(1, config["in_channels"], *sizes, generator=generator),
        "encoder_hidden_states": torch.randn(1, NUM_TEXT_TOKENS, config["caption_channels"], generator=generator),
        "timestep": torch.tensor([timestep]),
    }


def _mochi(config: Mapping[str, Any], timestep: float, generator: torch.Generator) -> dict[str, Tensor]:
    frames, height, width = NUM_PATCHES
    sizes = frames, height * config["patch_size"], width * config["patch_size"]
    return {
        "hidden_states": torch.randn(1, config["in_channels"], *sizes, generator=generator),
        "encoder_hidden_states": torch.randn(1, NUM_TEXT_TOKENS, config["text_embed_dim"], generator=generator),
        "encoder_attention_mask": torch.ones(1, NUM_TEXT_TOKENS),
        "timestep": torch.tensor([timestep]),
    }


def _stdit3(config: Mapping[str, Any], timestep: float, generator: torch.Generator) -> dict[str, Tensor]:
    frames, height, width = NUM_PATCHES
    sizes = frames, 2 * height, 2 * width
    return {
        "hidden_states": torch.randn(1, config["in_channels"], *sizes, generator=generator),
        "timestep": torch.tensor([timestep]),
        "encoder_hidden_states": torch.randn(1, NUM_TEXT_TOKENS, config["caption_channels"], generator=generator),
    }


_INPUTS: Mapping[str, Callable[[Mapping[str, Any], float, torch.Generator], dict[str, Tensor] | None]] = {
    "WanTransformer3DModel": _wan,
    "CogVideoXTransformer3DModel": _cogvideox,
    "LTXVideoTransformer3DModel": _ltx,
    "HunyuanVideoTransformer3DModel": _hunyuan_video,
    "HunyuanVideo15Transformer3DModel": _hunyuan_video_15,
    "LatteTransformer3DModel": _latte,
    "MochiTransformer3DModel": _mochi,
    "STDiT3": _stdit3,
}
