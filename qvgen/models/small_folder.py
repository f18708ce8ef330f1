"""Folders of the small model in the hub's layout, as its two trainings write them.

    after the VAE's training        model_index.json  vae/  text_encoder/  tokenizer/  scheduler/  transformer/config.json
    after the transformer's         the same, and the weights of transformer/

VAE and transformer are stored in bfloat16, so that both take less than 60 MB; the text encoder is stored as it was given. A
folder is there whole or not at all: it is written beside its place and renamed. card.json says how each part was made.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from torch import nn
from transformers import BertModel

from qvgen.models.folder.foreign_code import check_config
from qvgen.models.folder.tokenizer_folder import load_tokenizer
from qvgen.quant.finite import check_finite
from qvgen.run_directory import atomic_write

CARD_FILE = "card.json"
STORED_DTYPE = torch.bfloat16
_SHARED = ("vae", "text_encoder", "tokenizer", "scheduler")
"""Folders that the transformer's training takes over from the VAE's."""


def write_skeleton(
    folder: Path,
    *,
    vae: nn.Module,
    latents: tuple[Sequence[float], Sequence[float]],
    text_folder: Path,
    configs: Mapping[str, Mapping[str, Any]],
) -> Path:
    """Write a model's folder that lacks the transformer's weights alone.

    Args:
        folder: written anew; what lies there is replaced.
        vae: trained AutoencoderKLWan.
        latents: mean and standard deviation of each channel of its latents.
        text_folder: a BertModel with its tokenizer, as config.json, safetensors and tokenizer.json.
        configs: ``transformer`` and ``scheduler``: their configurations, the latter with its ``_class_name``.

    Returns:
        The folder.

    Raises:
        ValueError: ``text_folder`` holds no such text encoder, or one of another width than the transformer takes.
        OSError: it can't be written.
    """
    encoder, tokenizer = load_text_encoder(text_folder, width=int(configs["transformer"]["text_dim"]))
    with torch.device("meta"):
        transformer = WanTransformer3DModel(**configs["transformer"])
    scheduler = getattr(diffusers, configs["scheduler"]["_class_name"]).from_config(configs["scheduler"])
    stored = _narrow(vae)
    mean, deviation = (list(map(float, values)) for values in latents)
    stored.register_to_config(latents_mean=mean, latents_std=deviation)
    with _whole(folder) as temporary:
        WanPipeline(
            tokenizer=tokenizer, text_encoder=encoder, vae=stored, scheduler=scheduler, transformer=transformer
        ).save_config(temporary)
        stored.save_pretrained(temporary / "vae")
        encoder.save_pretrained(temporary / "text_encoder")
        tokenizer.save_pretrained(temporary / "tokenizer")
        scheduler.save_pretrained(temporary / "scheduler")
        transformer.save_config(temporary / "transformer")
    return folder


def write_small_folder(
    folder: Path, *, source_folder: Path, transformer: nn.Module, card: Mapping[str, Any] | None = None
) -> Path:
    """Write a complete model folder: a trained transformer and all else from the folder that it was trained with.

    Args:
        folder: written anew; what lies there is replaced.
        source_folder: what :func:`write_skeleton` wrote, or a complete folder.
        transformer: trained WanTransformer3DModel; it is not changed.
        card: how it was made; plain values.

    Returns:
        The folder.

    Raises:
        ValueError: the folder is its own source.
        OSError: something is missing in the source, or it can't be written.
    """
    if folder.resolve() == source_folder.resolve():
        raise ValueError(f"{folder} can't be written over itself; give another folder")
    with _whole(folder) as temporary:
        for name in _SHARED:
            shutil.copytree(source_folder / name, temporary / name)
        for name in ("model_index.json", CARD_FILE):
            if (source_folder / name).is_file():
                shutil.copyfile(source_folder / name, temporary / name)
        _narrow(transformer).save_pretrained(temporary / "transformer")
        write_card(temporary, "transformer", card or {})
    return folder


def write_card(folder: Path, part: str, card: Mapping[str, Any]) -> None:
    """Say in card.json how a part was made; what it says of the other parts stays."""
    path = folder / CARD_FILE
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    atomic_write(path, (json.dumps({**known, part: dict(card)}, indent=2) + "\n").encode())


@torch.no_grad()
def round_to_stored_(module: nn.Module) -> None:
    """Round float32 parameters to what is stored of them, in place; they stay float32. A second call changes nothing."""
    for name, parameter in module.named_parameters():
        parameter.copy_(parameter.to(_stored_dtype(module, name)))


def _narrow(module: nn.Module) -> Any:
    """A copy with its parameters in the dtypes that are stored."""
    narrow = copy.deepcopy(module)
    for name, parameter in narrow.named_parameters():
        parameter.data = parameter.data.to(_stored_dtype(module, name))
    return narrow


def _stored_dtype(module: nn.Module, name: str) -> torch.dtype:
    """bfloat16, but for what the class keeps in float32 whatever it is asked for: timesteps, modulation, norms."""
    exact = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    return torch.float32 if exact & set(name.split(".")) else STORED_DTYPE


def load_text_encoder(folder: Path, *, width: int) -> tuple[BertModel, Any]:
    """Read a BertModel of ``width`` channels and its tokenizer, strictly and from safetensors alone.

    Raises:
        ValueError: the folder holds no such text encoder.
    """
    try:
        check_config(json.loads((folder / "config.json").read_text(encoding="utf-8")), file=folder / "config.json")
        encoder, info = BertModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
        tokenizer = load_tokenizer(folder, remedy="give another folder")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} holds no text encoder ({' '.join(str(error).split())[:200]})") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ValueError(f"{folder} lacks tensors of its text encoder: {sorted(info['missing_keys'])[:1]}")
    if (size := encoder.config.hidden_size) != width:
        raise ValueError(f"{folder} holds a text encoder of {size} channels, the transformer takes {width}")
    check_finite(chain(encoder.named_parameters(), encoder.named_buffers()), source=str(folder))
    return encoder.eval(), tokenizer


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` that takes its place when the context ends without an error."""
    temporary = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*.safetensors"):  # safetensors makes files that nobody else can read
            file.chmod(temporary.stat().st_mode & 0o666)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
