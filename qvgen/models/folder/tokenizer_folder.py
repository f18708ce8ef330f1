"""A tokenizer's folder, of transformers' own classes: tokenizer.json, the files that it is made from, or bytes.

CogVideoX's has spiece.model alone, which sentencepiece reads. ByT5's tokens are the bytes of a text: its configuration is all
that there is.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qvgen.errors import UnfitEnvironmentError, one_line
from qvgen.models.folder.foreign_code import check_config

_VOCABULARIES = ("tokenizer.json", "spiece.model", "vocab.txt", "vocab.json")
_BYTES = "ByT5Tokenizer"


def check_tokenizer(folder: Path, *, remedy: str) -> None:
    """Find out whether a tokenizer is there.

    Args:
        folder: Its folder.
        remedy: How to get it, for messages.

    Raises:
        ValueError: it is missing.
        RuntimeError: sentencepiece is needed and not installed.
    """
    if not any((folder / name).is_file() for name in _VOCABULARIES) and not _is_of_bytes(folder, remedy=remedy):
        what = "is missing" if not folder.is_dir() else f"holds none of {', '.join(_VOCABULARIES)}"
        raise ValueError(f"{folder} {what}; {remedy}")
    is_spiece_alone = (folder / "spiece.model").is_file() and not (folder / "tokenizer.json").is_file()
    if is_spiece_alone and find_spec("sentencepiece") is None:
        raise UnfitEnvironmentError(
            f"{folder} needs the package sentencepiece, which is not installed: pip install sentencepiece"
        )


def load_tokenizer(folder: Path, *, remedy: str) -> Any:
    """Load a tokenizer of transformers' own classes from a folder; no code of the folder is run, and nobody is asked.

    Raises:
        ValueError: it is damaged or names code.
    """
    for name in ("tokenizer_config.json", "config.json"):
        if (folder / name).is_file():
            check_config(_read(folder / name, remedy=remedy), file=folder / name)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers of Rust raise Exception itself
        raise ValueError(f"{folder} can't be loaded ({one_line(error)[:300]}); {remedy}") from error


def _is_of_bytes(folder: Path, *, remedy: str) -> bool:
    """Whether a folder's tokens are bytes, so that it needs no vocabulary."""
    file = folder / "tokenizer_config.json"
    return file.is_file() and _read(file, remedy=remedy).get("tokenizer_class") == _BYTES


def _read(file: Path, *, remedy: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON ({one_line(error)[:300]}); {remedy}") from error
    return content
