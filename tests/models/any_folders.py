"""Complete folders of models that no family is named after, in the hub's layout: real classes, tiny sizes, random weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLAllegro,
    AutoencoderKLMagvit,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    DPMSolverMultistepScheduler,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
)
from transformers import (
    Gemma2Config,
    Gemma2Model,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.models.further_folders import llama_tokenizer
from tests.models.hub_folders import PIECES, TEXT_SIZE, _copy, _text_sizes

VARIANTS = ("skyreels", "sana_video", "pixart_sigma")


def make_any_folder(path: Path, variant: str = "skyreels", *, seed: int = 0) -> Path:
    """Two blocks of width 32 or 36, with the real compression of 4 x 8 x 8, or 8 x 8 of an image.

    skyreels       SkyReelsV2Pipeline, UniPC over flows
    sana_video     SanaVideoPipeline, Euler over flows, linear attention, masks of the text
    easyanimate    EasyAnimatePipeline, Euler over flows, a text encoder that chats
    pixart_sigma   PixArtSigmaPipeline, images, DPM-Solver over the noise, a variance besides
    pixart_alpha   PixArtAlphaPipeline, likewise, and told the size of the image
    sana           SanaPipeline, images, DPM-Solver over flows, a VAE without a posterior
    cogview3plus   CogView3PlusPipeline, images, DDIM over v, told sizes beside the image
    allegro        AllegroPipeline, whose VAE makes n of 4 n frames
    """
    return _copy(_save, path, variant, seed)


def _save(path: Path, variant: str) -> None:
    {
        "skyreels": _skyreels,
        "sana_video": _sana_video,
        "easyanimate": _easyanimate,
        "pixart_sigma": _pixart,
        "pixart_alpha": partial(_pixart, PixArtAlphaPipeline, head_size=18, sample_size=128),
        "sana": _sana,
        "cogview3plus": _cogview3plus,
        "allegro": _allegro,
    }[variant]().save_pretrained(path)


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


def _gemma() -> dict[str, Any]:
    tokenizer = T5Tokenizer(vocab=PIECES, extra_ids=0)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=TEXT_SIZE, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return {"tokenizer": tokenizer, "text_encoder": Gemma2Model(config).eval()}


def _sana_video() -> SanaVideoPipeline:
    return SanaVideoPipeline(
        **_gemma(),
        vae=_wan_vae(),
        transformer=SanaVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=TEXT_SIZE,
            sample_size=30, rope_max_seq_len=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=8.0),
    )  # fmt: skip


def _sana() -> SanaPipeline:
    coder = {
        "block_types": ("ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 8),
        "qkv_multiscales": ((), (5,)),
    }
    return SanaPipeline(
        **_gemma(),
        vae=AutoencoderDC(
            latent_channels=4, attention_head_dim=2, scaling_factor=0.41, encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1), downsample_block_type="conv", upsample_block_type="interpolate",
            **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in coder.items()},
        ),
        transformer=SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=TEXT_SIZE,
            sample_size=24, patch_size=1,
        ),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )  # fmt: skip


def _image_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4, layers_per_block=1, norm_num_groups=4, sample_size=32, scaling_factor=0.13025,
    )  # fmt: skip


def _cogview3plus() -> CogView3PlusPipeline:
    return CogView3PlusPipeline(
        **_t5(),
        vae=_image_vae(),
        transformer=CogView3PlusTransformer2DModel(
            in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            text_embed_dim=TEXT_SIZE, time_embed_dim=8, condition_dim=4, pos_embed_max_size=8, sample_size=8,
        ),
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False, rescale_betas_zero_snr=True,
            snr_shift_scale=4.0,
        ),
    )  # fmt: skip


def _pixart(kind: Any = PixArtSigmaPipeline, *, head_size: int = 16, sample_size: int = 8) -> Any:
    """A transformer of ``sample_size`` 128 is told the size of the image."""
    return kind(
        **_t5(),
        vae=_image_vae(),
        transformer=PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=head_size, in_channels=4, out_channels=8, num_layers=2,
            cross_attention_dim=2 * head_size, caption_channels=TEXT_SIZE, sample_size=sample_size,
        ),
        scheduler=DPMSolverMultistepScheduler(),
    )  # fmt: skip


def _easyanimate() -> EasyAnimatePipeline:
    tokenizer = llama_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'][0]['text'] }}{% endfor %}"
    text = {
        "vocab_size": len(tokenizer), "hidden_size": TEXT_SIZE, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": None,
        "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": TEXT_SIZE, "num_heads": 2, "mlp_ratio": 1}
    return EasyAnimatePipeline(
        tokenizer=tokenizer,
        text_encoder=Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)).eval(),
        vae=AutoencoderKLMagvit(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
        ),
        transformer=EasyAnimateTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, num_layers=2,
            mmdit_layers=2, time_embed_dim=8, text_embed_dim=TEXT_SIZE, sample_width=8, sample_height=8,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )  # fmt: skip


def _allegro() -> AllegroPipeline:
    return AllegroPipeline(
        **_t5(),
        vae=AutoencoderKLAllegro(
            block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
        ),
        transformer=AllegroTransformer3DModel(
            num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=2,
            cross_attention_dim=48, caption_channels=TEXT_SIZE,
        ),
        scheduler=EulerAncestralDiscreteScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )  # fmt: skip
