"""A trained text encoder as a model whose Linears can be quantized: token states, and an embedding of each sentence.

Where a bench of PTQ methods wants a trained transformer of some width, this is one that package registries carry
(all-MiniLM-L6-v2: 6 blocks, 384 and 1536 columns). It has no timestep; its calls are told the timestep 0, and it has one
noise band. The embedding is the mean of a sentence's token states, as that model was trained for. Sentences are run one
by one, so that no padding is quantized or measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

NUM_NOISE_BANDS = 1
INCLUDE = ("encoder.encoder.layer.*",)
SHARED_INPUTS = (("attention.self.query", "attention.self.key", "attention.self.value"),)
BEHIND_GELU = ".output.dense"
"""End of the names of the Linears that read what the activation function gives, but for :data:`BEHIND_ATTENTION`."""

BEHIND_ATTENTION = ".attention.output.dense"


class SentenceEncoder(nn.Module):
    """A BertModel that takes a timestep.

    Attributes:
        encoder: The BertModel, float32, in eval mode, without its pooling layer.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, *, timestep: Tensor) -> Tensor:  # noqa: ARG002 - quantized layers read it
        """Token states float32 [1, T, D] of a sentence int64 [1, T]; ``timestep`` [1] chooses the noise band."""
        states: Tensor = self.encoder(input_ids=input_ids).last_hidden_state
        return states

    @torch.no_grad()
    def states(self, sentences: Sequence[Tensor]) -> list[Tensor]:
        """Token states float32 [T, D] of each sentence."""
        return [self(input_ids, timestep=torch.zeros(1))[0] for input_ids in sentences]


def load_sentence_encoder(folder: Path) -> tuple[SentenceEncoder, Any]:
    """The encoder of a folder as transformers writes it, and its tokenizer; nothing is downloaded, no code is run.

    Raises:
        ValueError: The folder holds no BertModel, or lacks a tensor.
    """
    from transformers import BertModel

    from qvgen.models.folder.foreign_code import check_config
    from qvgen.models.folder.tokenizer_folder import load_tokenizer

    folder = Path(folder).expanduser()
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        check_config(config, file=folder / "config.json")
        if config.get("model_type") != "bert":
            raise ValueError(f"config.json has model_type={config.get('model_type')!r}, not 'bert'")
        encoder, info = BertModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True,
        )  # fmt: skip
        tokenizer = load_tokenizer(folder, remedy="give another folder")
    except (OSError, ValueError, AttributeError) as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder} holds no sentence encoder ({line}); give a BertModel's folder") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ValueError(f"{folder} lacks tensors of its encoder: {sorted(info['missing_keys'])[:1]}")
    encoder.pooler = None  # stored beside the blocks, and no part of the embedding
    return SentenceEncoder(encoder.eval().requires_grad_(False)), tokenizer


def revision(folder: Path) -> str:
    """Checksum of the folder's weights, configuration and tokenizer."""
    digest = hashlib.sha256()
    files = sorted(path for path in Path(folder).expanduser().glob("*") if path.suffix in (".json", ".safetensors"))
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def tokenized(tokenizer: Any, sentences: Sequence[str]) -> list[Tensor]:
    """Token numbers int64 [1, T] of each sentence."""
    return [tokenizer(sentence, return_tensors="pt", truncation=True)["input_ids"] for sentence in sentences]


def mean_cosine(states: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Cosine of sentence embeddings to those of the reference, mean over the sentences.

    Args:
        states: Token states [T, D] of each sentence.
        reference: The same of the reference.
    """
    pairs = zip(states, reference, strict=True)
    found = [functional.cosine_similarity(one.double().mean(0), other.double().mean(0), dim=0) for one, other in pairs]
    return float(torch.stack(found).mean())
