"""Complete folders of models that no family is named after, in the hub's layout: real classes, tiny sizes, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
)
from transformers import (
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.models.hub_folders import PIECES, TEXT_SIZE, _copy, _text_sizes

VARIANTS = ("skyreels", "sana_video", "pixart")


def make_any_folder(path: Path, variant: str = "skyreels", *, seed: int = 0) -> Path:
    """One of ``VARIANTS``: two blocks of width 32, with the real compression of 4 x 8 x 8, or 8 x 8 of an image.

    skyreels      SkyReelsV2Pipeline, UniPC over flows
    sana_video    SanaVideoPipeline, Euler over flows, linear attention, masks of the text
    pixart        PixArtSigmaPipeline, images, DPM-Solver over the noise, a variance besides
    """
    return _copy(_save, path, variant, seed)


def _save(path: Path, variant: str) -> None:
    {"skyreels": _skyreels, "sana_video": _sana_video, "pixart": _pixart}[variant]().save_pretrained(path)


def _wan_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1 * i - 0.2 for i in range(4)], latents_std=[0.5 + 0.1 * i for i in range(4)],
    )  # fmt: skip


def _t5(kind: Any = T5EncoderModel, config: Any = T5Config) -> dict[str, Any]:
    sizes = {**_text_sizes(), "feed_forward_proj": "gated-gelu"}
    return {"tokenizer": T5Tokenizer(vocab=PIECES, extra_ids=0), "text_encoder": kind(config(**sizes)).eval()}


def _skyreels() -> SkyReelsV2Pipeline:
    return SkyReelsV2Pipeline(
        **_t5(UMT5EncoderModel, UMT5Config),
        vae=_wan_vae(),
        transformer=SkyReelsV2Transformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=TEXT_SIZE, freq_dim=32,
            ffn_dim=48, num_layers=2, rope_max_seq_len=32,
        ),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0),
    )  # fmt: skip


def _sana_video() -> SanaVideoPipeline:
    tokenizer = T5Tokenizer(vocab=PIECES, extra_ids=0)
    return SanaVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(
            Gemma2Config(
                vocab_size=len(tokenizer), hidden_size=TEXT_SIZE, intermediate_size=24, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=1, head_dim=8,
            )
        ).eval(),
        vae=_wan_vae(),
        transformer=SanaVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=TEXT_SIZE,
            sample_size=30, rope_max_seq_len=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=8.0),
    )  # fmt: skip


def _pixart() -> PixArtSigmaPipeline:
    return PixArtSigmaPipeline(
        **_t5(),
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4, layers_per_block=1, norm_num_groups=4, sample_size=32, scaling_factor=0.13025,
        ),
        transformer=PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=32,
            caption_channels=TEXT_SIZE, sample_size=8, use_additional_conditions=False,
        ),
        scheduler=DPMSolverMultistepScheduler(),
    )  # fmt: skip
