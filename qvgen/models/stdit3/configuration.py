"""Configurations of Open-Sora's transformer and VAE, as they were published and as arguments of qvgen's classes.

Sizes that both parts and the family share stand here too, apart from the classes: those import diffusers, and the plan of a
recorded model does without.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PATCH = (1, 2, 2)
"""Latents of a patch along time, height and width."""
PIXELS = 8
"""Pixels of a latent along a side."""
HALVES = (False, True, True)
"""Which levels of the temporal net halve the frames behind them."""
FACTOR = 2 ** sum(HALVES)
"""Frames of a latent."""
WINDOW, SHIFT, SCALE = 17, (-0.10, 0.34, 0.27, 0.98), (3.85, 2.32, 2.33, 3.06)

_RENAMED = {"depth": "num_layers", "num_heads": "num_attention_heads"}
_FIXED = {"patch_size": list(PATCH), "mlp_ratio": 4.0, "pred_sigma": True, "qk_norm": True, "skip_y_embedder": False}
_OF_TRAINING = (
    "class_dropout_prob", "drop_path", "enable_flash_attn", "enable_layernorm_kernel", "enable_sequence_parallelism",
    "only_train_temporal", "freeze_y_embedder", "input_size", "force_huggingface",
)  # fmt: skip
_OF_TRANSFORMERS = ("architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version")


def own_config(published: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of :class:`qvgen.models.stdit3.transformer.STDiT3` that a published config.json says.

    What only trains or speeds up is left out.

    Raises:
        ValueError: It is of a variant that is not there.

    >>> own_config({"depth": 28, "num_heads": 16, "qk_norm": True, "drop_path": 0.0})
    {'num_layers': 28, 'num_attention_heads': 16}
    """
    for key, value in _FIXED.items():
        found = list(published[key]) if isinstance(published.get(key), tuple) else published.get(key, value)
        if found != value:
            raise ValueError(f"an STDiT3 of {key}={found} is not there; the published one has {value}")
    left_out = {*_FIXED, *_OF_TRAINING, *_OF_TRANSFORMERS}
    return {_RENAMED.get(key, key): value for key, value in published.items() if key not in left_out}


def published_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json that the authors publish for a transformer of these arguments: the inverse of :func:`own_config`.

    >>> published = published_config({"num_layers": 28, "hidden_size": 1152})
    >>> published["depth"], own_config(published)
    (28, {'num_layers': 28, 'hidden_size': 1152})
    """
    names = {own: theirs for theirs, own in _RENAMED.items()}
    sizes = {names.get(key, key): value for key, value in arguments.items()}
    return {"architectures": ["STDiT3"], "model_type": "STDiT3", **_FIXED, **sizes}


def latent_frames(frames: int, *, window: int) -> int:
    """Latents of a number of frames.

    >>> latent_frames(1, window=17), latent_frames(17, window=17), latent_frames(51, window=17)
    (1, 5, 15)
    """
    whole, rest = divmod(frames, window)
    return whole * -(-window // FACTOR) + -(-rest // FACTOR)


def own_vae_config(published: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of :class:`qvgen.models.stdit3.vae.VideoAutoencoderPipeline` that a published config.json says.

    >>> own_vae_config({"shift": [0.0], "scale": [1.0], "micro_frame_size": 17, "cal_loss": False})
    {'latent_shift': [0.0], 'latent_scale': [1.0], 'micro_frame_size': 17}
    """
    named = {"shift": "latent_shift", "scale": "latent_scale"}
    known = ("vae_2d", "vae_temporal", "micro_frame_size", *named.values())
    return {named.get(key, key): value for key, value in published.items() if named.get(key, key) in known}
