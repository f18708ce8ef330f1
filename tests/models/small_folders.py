"""A tiny text encoder of the small model's class, and the small family at sizes that a test can train."""

from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import BertConfig, BertModel, BertTokenizer

from qvgen.config.leaves import build_leaf, conf_directory

TEXT_SIZE = 16
SIZES = {"height": 32, "width": 48, "num_frames": 9, "sampling_frames": 9}
TRANSFORMER = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "ffn_dim": 48, "freq_dim": 32, "in_channels": 4,
    "out_channels": 4, "text_dim": TEXT_SIZE, "rope_max_seq_len": 32,
}  # fmt: skip
VAE = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 2, 2], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "boat", "two", "dog", "dogs", "run", "##s"]


def make_text_encoder(folder: Path) -> Path:
    """A BertModel of 16 channels with a tokenizer of thirteen words, as the real one lies in its package."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(_WORDS), hidden_size=TEXT_SIZE, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=128,
    )  # fmt: skip
    BertModel(config).eval().save_pretrained(folder)
    BertTokenizer(vocab={word: index for index, word in enumerate(_WORDS)}).save_pretrained(folder)
    return folder


def small_family(path: Path | None = None, *, tiny: bool = True, **changes: Any) -> Any:
    """The family of conf/model/small.yaml; ``tiny``: with networks and clips of a test's size."""
    spec = yaml.safe_load((conf_directory() / "model" / "small.yaml").read_text(encoding="utf-8"))
    del spec["recipe"]
    if tiny:
        spec.update(SIZES)
        spec["published"]["transformer"].update(TRANSFORMER)
        spec["published"]["vae"].update(VAE)
    return build_leaf({**spec, "path": None if path is None else str(path), **changes}, key="model")


def overrides() -> list[str]:
    """The same sizes as overrides of a command."""
    sections = [("model", SIZES), ("model.published.transformer", TRANSFORMER), ("model.published.vae", VAE)]
    return [f"{key}.{name}={value}".replace(" ", "") for key, values in sections for name, value in values.items()]
