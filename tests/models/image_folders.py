"""Complete folders of image-to-video models in the hub's layout, of the real classes at tiny sizes with random weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.models.hub_folders import COGVIDEOX_VARIANTS, PIECES, TEXT_SIZE, _copy, _text_sizes

IMAGE_SIZE = 12
CHANNELS = 4


def make_wan_image_folder(path: Path, variant: str = "2.1", *, seed: int = 0) -> Path:
    """Wan, image to video: 2 blocks of width 32 and 12 input channels.

    Args:
        path: Where it is made.
        variant: ``2.1`` with an image encoder of five tokens, or ``a14b`` with two transformers.
        seed: Seed of the weights.
    """
    return _copy(_save_wan_image, path, variant, seed)


def make_cogvideox_image_folder(path: Path, variant: str = "5b", *, seed: int = 0) -> Path:
    """CogVideoX, image to video: 2 blocks of width 32; ``5b`` with learned positions of 32 x 48 pixels, or ``1.5``."""
    return _copy(_save_cogvideox_image, path, variant, seed)


def write_image(path: Path, *, height: int = 32, width: int = 48, shade: int = 200) -> Path:
    """A picture of a bright square on a gradient."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width, dtype=np.uint8)
    pixels[height // 4 : height // 2, width // 4 : width // 2, 1] = shade
    Image.fromarray(pixels).save(path)
    return path


def write_prompts(folder: Path) -> Path:
    """Two captions with images of two sizes, whose paths start from the file's folder."""
    write_image(folder / "first.png")
    write_image(folder / "second.png", height=60, width=70, shade=90)
    lines = [{"prompt": "a red boat", "image": "first.png"}, {"prompt": "two dogs run", "image": "second.png"}]
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def _save_wan_image(path: Path, variant: str) -> None:
    has_encoder = variant == "2.1"
    sizes: dict[str, Any] = {"image_dim": IMAGE_SIZE, "added_kv_proj_dim": 32} if has_encoder else {}
    transformer, second = (
        WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=2 * CHANNELS + 4, out_channels=CHANNELS,
            text_dim=TEXT_SIZE, freq_dim=32, ffn_dim=48, num_layers=2, rope_max_seq_len=32, **sizes,
        )
        for _ in range(2)
    )  # fmt: skip
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=IMAGE_SIZE, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16,
            patch_size=8, projection_dim=4,
        )
    )  # fmt: skip
    WanImageToVideoPipeline(
        tokenizer=T5Tokenizer(vocab=PIECES, extra_ids=0),
        text_encoder=UMT5EncoderModel(UMT5Config(**_text_sizes())).eval(),
        vae=AutoencoderKLWan(
            base_dim=4, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.1 * i - 0.2 for i in range(CHANNELS)], latents_std=[0.5 + 0.1 * i for i in range(CHANNELS)],
        ),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
        image_processor=(
            CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}) if has_encoder else None
        ),
        image_encoder=encoder.eval() if has_encoder else None,
        transformer=transformer,
        transformer_2=None if has_encoder else second,
        boundary_ratio=None if has_encoder else 0.9,
    ).save_pretrained(path)  # fmt: skip


def _save_cogvideox_image(path: Path, variant: str) -> None:
    sizes = COGVIDEOX_VARIANTS[variant]
    told = {"ofs_embed_dim": 16} if variant == "1.5" else {"use_learned_positional_embeddings": True}
    CogVideoXImageToVideoPipeline(
        tokenizer=T5Tokenizer(vocab=PIECES, extra_ids=0),
        text_encoder=T5EncoderModel(T5Config(**_text_sizes(), feed_forward_proj="gated-gelu")).eval(),
        vae=AutoencoderKLCogVideoX(
            block_out_channels=(4, 4, 4, 4), latent_channels=CHANNELS, layers_per_block=1, norm_num_groups=2,
            scaling_factor=0.7, invert_scale_latents=variant == "1.5",
        ),
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=2 * CHANNELS, out_channels=CHANNELS,
            time_embed_dim=16, text_embed_dim=TEXT_SIZE, num_layers=2, **sizes, **told,
        ),
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False, rescale_betas_zero_snr=True,
            snr_shift_scale=1.0,
        ),
    ).save_pretrained(path)  # fmt: skip


def clip_of(image: Path, *, frames: int) -> torch.Tensor:
    """A clip [1, 3, F, H, W] in [-1, 1] that begins with an image and grows darker."""
    first = torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1).float() / 127.5 - 1
    return torch.stack([first * (1 - frame / frames) for frame in range(frames)], dim=1)[None]
