"""A complete folder of Open-Sora 1.2 as its parts are published: the real classes at tiny sizes, random weights.

Configurations and file names are those of transformers, with the authors' own keys.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from qvgen.models.stdit3.transformer import STDiT3
from qvgen.models.stdit3.vae import VideoAutoencoderPipeline
from tests.models.hub_folders import PIECES, TEXT_SIZE, _copy, _text_sizes

WINDOW = 9
"""Frames of a window of the tiny VAE, which are 3 latents."""
OPENSORA_TRANSFORMER: dict[str, Any] = {
    "num_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "caption_channels": TEXT_SIZE, "model_max_length": 40,
}  # fmt: skip
OF_TRANSFORMERS = {"torch_dtype": "float32", "transformers_version": "4.40.1"}
TRANSFORMER_CONFIG = {
    "_name_or_path": "somewhere", "architectures": ["STDiT3"], "model_type": "STDiT3", "depth": 2, "num_heads": 2,
    "hidden_size": 32, "caption_channels": TEXT_SIZE, "model_max_length": 40, "in_channels": 4, "input_size": [None] * 3,
    "input_sq_size": 512, "mlp_ratio": 4.0, "patch_size": [1, 2, 2], "pred_sigma": True, "qk_norm": True, "drop_path": 0.0,
    "class_dropout_prob": 0.1, "enable_flash_attn": True, "enable_layernorm_kernel": True, "only_train_temporal": False,
    "enable_sequence_parallelism": False, "freeze_y_embedder": True, "skip_y_embedder": False, **OF_TRANSFORMERS,
}  # fmt: skip
VAE_2D = {"block_out_channels": [4, 4, 4, 4], "norm_num_groups": 2, "layers_per_block": 1}
VAE_TEMPORAL = {"filters": 4, "num_res_blocks": 1, "num_groups": 2}
VAE_CONFIG = {
    "architectures": ["VideoAutoencoderPipeline"], "model_type": "VideoAutoencoderPipeline", "cal_loss": False,
    "freeze_vae_2d": False, "from_pretrained": None, "micro_frame_size": WINDOW,
    "vae_2d": {"type": "VideoAutoencoderKL", "from_pretrained": "PixArt", "micro_batch_size": 4, **VAE_2D},
    "vae_temporal": {"type": "VAE_Temporal_SD", "from_pretrained": None, **VAE_TEMPORAL},
    "shift": [-0.10, 0.34, 0.27, 0.98], "scale": [3.85, 2.32, 2.33, 3.06], **OF_TRANSFORMERS,
}  # fmt: skip


def make_opensora_folder(path: Path, variant: str = "1.2", *, seed: int = 0) -> Path:
    """Two spatial and two temporal blocks of width 32, a VAE with the real compression of 4 x 8 x 8."""
    return _copy(_save, path, variant, seed)


def _save(path: Path, variant: str) -> None:
    del variant
    vae = VideoAutoencoderPipeline(vae_2d=VAE_2D, vae_temporal=VAE_TEMPORAL, micro_frame_size=WINDOW)
    _write(path / "transformer", STDiT3(**OPENSORA_TRANSFORMER), TRANSFORMER_CONFIG)
    _write(path / "vae", vae, VAE_CONFIG)
    T5EncoderModel(T5Config(**_text_sizes(), feed_forward_proj="gated-gelu")).save_pretrained(path / "text_encoder")
    T5Tokenizer(vocab=PIECES, extra_ids=0).save_pretrained(path / "tokenizer")


def _write(folder: Path, module: nn.Module, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    state = {name: value.detach().to(torch.float32).contiguous() for name, value in module.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
