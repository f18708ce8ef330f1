"""Complete model folders in the hub's layout, of the real classes at tiny sizes with random weights.

A folder is what ``hf download`` leaves: model_index.json and transformer/, vae/, text_encoder/, tokenizer/, scheduler/,
all by ``save_pretrained``. CogVideoX's repositories have a tokenizer without tokenizer.json: :func:`leave_spiece_alone`.
"""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer, UMT5Config, UMT5EncoderModel
from transformers.convert_slow_tokenizer import import_protobuf

TEXT_SIZE = 16
CAPTIONS = ["a red boat", "two dogs run"]
PIECES = [
    ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -2.0), ("▁red", -3.0), ("▁boat", -3.5), ("▁dog", -3.5),
    ("▁run", -4.0), ("s", -4.0), *[(letter, -6.0) for letter in "abcdefghijklmnopqrtuvwxyz"],
]  # fmt: skip

COGVIDEOX_VARIANTS: dict[str, dict[str, Any]] = {
    "2b": {"sample_height": 4, "sample_width": 6, "sample_frames": 9},
    "5b": {"sample_height": 4, "sample_width": 6, "sample_frames": 9, "use_rotary_positional_embeddings": True},
    "1.5": {
        "sample_height": 300, "sample_width": 300, "sample_frames": 9, "use_rotary_positional_embeddings": True,
        "patch_size_t": 2, "patch_bias": False,
    },
}  # fmt: skip


def make_cogvideox_folder(path: Path, variant: str = "2b", *, seed: int = 0) -> Path:
    """CogVideoX: 2 blocks of width 32, a VAE of 4 latent channels with the real compression of 4 x 8 x 8."""
    return _copy(_save_cogvideox, path, variant, seed)


def make_wan_folder(path: Path, variant: str = "2.1", *, seed: int = 0) -> Path:
    """Wan: 2 blocks of width 32.

    Compression of 4 x 8 x 8 (2.1), or 4 x 16 x 16 and a timestep per token (ti2v), or two transformers (a14b).
    """
    return _copy(_save_wan, path, variant, seed)


def _copy(save: Callable[[Path, str], None], path: Path, variant: str, seed: int) -> Path:
    torch.manual_seed(seed)
    shutil.copytree(_made_once(save, variant, seed), path, dirs_exist_ok=True)
    return path


@functools.cache
def _made_once(save: Callable[[Path, str], None], variant: str, seed: int) -> Path:
    """A folder that is made once in a process and then copied; it is deleted as the process ends."""
    root = Path(tempfile.mkdtemp(prefix="qvgen-tests-model-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    save(root, variant)
    return root


def _save_cogvideox(path: Path, variant: str) -> None:
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=16,
        text_embed_dim=TEXT_SIZE, num_layers=2, **COGVIDEOX_VARIANTS[variant],
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        scaling_factor=1.15258426 if variant == "2b" else 0.7, invert_scale_latents=variant == "1.5",
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False, rescale_betas_zero_snr=True,
        snr_shift_scale=3.0 if variant == "2b" else 1.0,
    )  # fmt: skip
    CogVideoXPipeline(
        tokenizer=T5Tokenizer(vocab=PIECES, extra_ids=0),
        text_encoder=T5EncoderModel(T5Config(**_text_sizes(), feed_forward_proj="gated-gelu")).eval(),
        vae=vae,
        transformer=transformer,
        scheduler=scheduler,
    ).save_pretrained(path)


def _save_wan(path: Path, variant: str) -> None:
    channels = 8 if variant == "ti2v" else 4
    transformer, second = (
        WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=channels, out_channels=channels,
            text_dim=TEXT_SIZE, freq_dim=32, ffn_dim=48, num_layers=2, rope_max_seq_len=32,
        )
        for _ in range(2)
    )  # fmt: skip
    residual = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1 * i - 0.2 for i in range(channels)], latents_std=[0.5 + 0.1 * i for i in range(channels)],
        **(residual if variant == "ti2v" else {}),
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000,
        flow_shift=5.0 if variant == "ti2v" else 3.0,
    )  # fmt: skip
    WanPipeline(
        tokenizer=T5Tokenizer(vocab=PIECES, extra_ids=0),
        text_encoder=UMT5EncoderModel(UMT5Config(**_text_sizes())).eval(),
        vae=vae,
        transformer=transformer,
        scheduler=scheduler,
        transformer_2=second if variant == "a14b" else None,
        boundary_ratio=0.875 if variant == "a14b" else None,
        expand_timesteps=variant == "ti2v",
    ).save_pretrained(path)
    # As Wan's repositories have it; their weights are tied all the same.
    text_config = path / "text_encoder" / "config.json"
    text_config.write_text(json.dumps({**json.loads(text_config.read_text()), "tie_word_embeddings": False}))


def leave_spiece_alone(folder: Path) -> None:
    """Replace tokenizer.json by a sentencepiece unigram model of ``PIECES``, the files of CogVideoX's repositories."""
    proto = import_protobuf().ModelProto()
    proto.trainer_spec.model_type = 1  # unigram
    proto.trainer_spec.pad_id, proto.trainer_spec.eos_id, proto.trainer_spec.unk_id = 0, 1, 2
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}  # control, unknown; 1 is normal
    for piece, score in PIECES:
        proto.pieces.add(piece=piece, score=score, type=kinds.get(piece, 1))
    (folder / "tokenizer" / "spiece.model").write_bytes(proto.SerializeToString())
    (folder / "tokenizer" / "tokenizer.json").unlink()


def _text_sizes() -> dict[str, Any]:
    return {
        "vocab_size": len(PIECES), "d_model": TEXT_SIZE, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2,
    }  # fmt: skip
