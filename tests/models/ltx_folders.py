"""Complete model folders of LTX-Video and Latte in the hub's layout: the real classes at tiny sizes, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    LTXConditionPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from tests.models.hub_folders import PIECES, TEXT_SIZE, _copy, _text_sizes

LTX_TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 8, "out_channels": 8, "num_layers": 2,
    "cross_attention_dim": 32, "caption_channels": TEXT_SIZE,
}  # fmt: skip
LATTE_TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
    "cross_attention_dim": 32, "caption_channels": TEXT_SIZE, "attention_bias": True, "patch_size": 2, "sample_size": 8,
    "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False, "norm_eps": 1e-6, "video_length": 9,
}  # fmt: skip


def make_ltx_folder(path: Path, variant: str = "0.9.0", *, seed: int = 0) -> Path:
    """LTX: 2 blocks of width 32, a VAE of 8 latent channels with the real compression of 8 x 32 x 32.

    The decoder of 0.9.1 is told a timestep and adds noise; 13b's is told one, and its pipeline is the one of conditions.
    """
    return _copy(_save_ltx, path, variant, seed)


def make_latte_folder(path: Path, variant: str = "1", *, seed: int = 0) -> Path:
    """Latte: 2 spatial and 2 temporal blocks of width 32 with positions for 9 frames, a VAE of images."""
    return _copy(_save_latte, path, variant, seed)


def _save_ltx(path: Path, variant: str) -> None:
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
        **_decoder(None if variant == "0.9.0" else variant == "0.9.1"),
    )  # fmt: skip
    vae.latents_mean.copy_(torch.linspace(-0.2, 0.3, 8))
    vae.latents_std.copy_(torch.linspace(0.5, 1.2, 8))
    for name, parameter in vae.named_parameters():
        if "per_channel_scale" in name:
            parameter.data.fill_(0.5)
    dynamic = {
        "use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024,
        "max_image_seq_len": 4096, "shift_terminal": 0.1,
    }  # fmt: skip
    pipeline_class = LTXConditionPipeline if variant == "13b" else LTXPipeline
    pipeline_class(
        tokenizer=T5Tokenizer(vocab=PIECES, extra_ids=0),
        text_encoder=T5EncoderModel(T5Config(**_text_sizes(), feed_forward_proj="gated-gelu")).eval(),
        vae=vae,
        transformer=LTXVideoTransformer3DModel(**LTX_TRANSFORMER),
        scheduler=FlowMatchEulerDiscreteScheduler(**({} if variant == "13b" else dynamic)),
    ).save_pretrained(path)


def _decoder(adds_noise: bool | None) -> dict[str, Any]:
    """The decoder of 0.9.0 (None) or of the versions after it."""
    if adds_noise is None:
        return {"decoder_block_out_channels": (8, 8, 8, 8), "decoder_layers_per_block": (1, 1, 1, 1, 1)}
    return {
        "decoder_block_out_channels": (8, 16, 32), "decoder_layers_per_block": (1, 1, 1, 1), "timestep_conditioning": True,
        "decoder_spatio_temporal_scaling": (True, True, True),
        "decoder_inject_noise": (adds_noise, adds_noise, adds_noise, False),
        "upsample_residual": (True, True, True), "upsample_factor": (2, 2, 2),
    }  # fmt: skip


def _save_latte(path: Path, variant: str) -> None:
    del variant
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), latent_channels=4, norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    LattePipeline(
        tokenizer=T5Tokenizer(vocab=PIECES, extra_ids=0),
        text_encoder=T5EncoderModel(T5Config(**_text_sizes(), feed_forward_proj="gated-gelu")).eval(),
        vae=vae,
        transformer=LatteTransformer3DModel(**LATTE_TRANSFORMER),
        scheduler=DDIMScheduler(clip_sample=False),
    ).save_pretrained(path)
