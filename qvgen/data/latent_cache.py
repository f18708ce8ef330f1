"""Latents of clips and embeddings of captions on the disk, made once, found again by what they were made from.

    FOLDER/latents/ab/KEY.safetensors    {"latents": [C, f, h, w]}   KEY: clip's bytes, frames, box, bucket, VAE
                                         of an image-to-video model also "first_frame", uint8 [H, W, 3], and what it became;
                                         the image encoder is part of KEY then
    FOLDER/texts/ab/KEY.safetensors      {"encoder_hidden_states": [T, D], ...}   KEY: caption, text encoder
    FOLDER/records/SETTINGS/ab/ROW.json  what became of one row of a table: its files' keys and seals, or why there are none
    FOLDER/indexes/INDEX.json            all rows of one table under one setting, once each has a record
                                         (:mod:`qvgen.data.cache_index`)

Keys are SHA-256 of everything that decides the content, so another rate, bucket, VAE or text encoder finds nothing of the
old one, and a moved or copied clip finds its latents. A row's key holds its file's size and times instead of its bytes: a
table that was done is recognized without reading its videos. The time of the last change (ctime) is one of them, which no
program sets: a clip in another's place with the same name, size and date is seen.

Every file is written whole or not at all, and that it is there does not make it right. Tensors carry a seal
(:mod:`qvgen.data.sealed_tensors`), which the row's record repeats. ``qvgen precompute`` reads all tensors and makes
anew what is not as it was written; a training run looks at every seal before it starts and at the values as it reads them.
A record or an index that is damaged counts as missing.

Tensors are stored in the narrowest of bfloat16, float16 and their own type that loses no bit, and are read as float32.

Filling it is :mod:`qvgen.data.cache_fill`. Left out: deleting entries that no index needs any more.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qvgen.data.captions import Clip, ClipTable
from qvgen.data.clip_report import is_left_out
from qvgen.data.clips import ClipCut, CutSettings
from qvgen.data.sealed_tensors import DamagedFileError, read_seal, read_sealed, write_sealed
from qvgen.data.video_reader import READER
from qvgen.errors import UserError
from qvgen.run_directory import atomic_write

FORMAT = 1
"""Number of the cache's format, part of every key: it is raised whenever equal settings come to mean other content, so that
entries of older versions are never taken for new ones."""

FIRST_FRAME = "first_frame"
"""Name of a clip's first frame among its tensors; the others but ``latents`` are what it became."""

_ENCODER = json.JSONEncoder(sort_keys=True, allow_nan=False)
_DIGEST = re.compile("[0-9a-f]{64}")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """The settings that a cache's content depends on, besides clips and captions.

    Attributes:
        cut: Rate and buckets.
        vae_revision: Identifier of the VAE and its arithmetic: of all that changes its latents.
        text_revision: Which text encoder, how many tokens, in which arithmetic.
    """

    cut: CutSettings
    vae_revision: str
    text_revision: str

    def __post_init__(self) -> None:
        for name in ("vae_revision", "text_revision"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give what identifies the weights, such as their checksum")


def content_key(*parts: Any) -> str:
    """SHA-256 of plain values, 64 hex digits: equal for equal values only."""
    return hashlib.sha256(_ENCODER.encode([FORMAT, *parts]).encode()).hexdigest()


class LatentCache:
    """A folder of latents and embeddings under one setting; any number of processes may read and write it.

    Args:
        folder: Made when something is written.
        settings: The settings that its content depends on.
    """

    def __init__(self, folder: Path | str, *, settings: CacheSettings) -> None:
        self.folder = Path(folder)
        self.settings = settings
        self._settings_key = content_key("settings", asdict(settings), READER)

    def latent_key(self, clip_sha256: str, cut: ClipCut) -> str:
        """Key of the latents of one cut of a clip."""
        return content_key("latents", clip_sha256, cut.content, self.settings.vae_revision)

    def text_key(self, caption: str) -> str:
        """Key of a caption's embedding."""
        return content_key("text", caption, self.settings.text_revision)

    def row_key(self, clip: Clip) -> str:
        """Key of a row: its name, its caption, and its file's size and times (or its bytes, or its place in an archive)."""
        return content_key("row", clip.name, clip.caption, *clip.state())

    def index_path(self, table: ClipTable) -> Path:
        """Where the index of a table under this setting is, or will be."""
        key = content_key("index", self._settings_key, table.states())
        return self.folder / "indexes" / f"{key}.json"

    def file(self, kind: str, key: str) -> str:
        """The file of a key.

        Args:
            kind: ``latents`` or ``texts``.
            key: The latents' or the embedding's.
        """
        return f"{self.folder}/{kind}/{key[:2]}/{key}.safetensors"

    def latent_path(self, key: str) -> Path:
        """The file of some latents."""
        return Path(self.file("latents", key))

    def text_path(self, caption: str) -> Path:
        """The file of a caption's embedding."""
        return Path(self.file("texts", self.text_key(caption)))

    def record_path(self, row_key: str) -> Path:
        """The file that says what became of a row."""
        return self.folder / "records" / self._settings_key[:32] / row_key[:2] / f"{row_key}.json"

    def read_record(self, row_key: str) -> dict[str, Any] | None:
        """The record of a row; None where nothing is known: there is no record, or it is damaged."""
        path = self.record_path(row_key)
        record = read_json(path, expected=is_record)
        if record is None and path.exists():
            log.warning("%s is damaged; what it said is found out again", path)
        return record

    def write_record(self, row_key: str, record: Mapping[str, Any]) -> None:
        """Say what became of a row."""
        path = self.record_path(row_key)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(record, sort_keys=True).encode())

    def write_latents(
        self, key: str, latents: Float[Tensor, "C f h w"], *, first_frame: Mapping[str, Tensor] | None = None
    ) -> str:
        """Keep the latents of a cut, and its first frame with what that became; returns their seal."""
        kept = {"latents": latents, **(first_frame or {})}
        return write_sealed(self.latent_path(key), {name: narrowest(tensor) for name, tensor in kept.items()}, key=key)

    def read_clip(self, key: str, *, seal: str | None = None) -> dict[str, Tensor]:
        """Tensors of a clip: ``latents``, float32 [C, f, h, w], and what belongs to its first frame.

        Args:
            key: Key of the latents.
            seal: Seal of the latents that the row's record holds; None checks only that they are as they were written.

        Raises:
            UserError: They are not there any more, or the file is damaged.
        """
        return _read(self.latent_path(key), key=key, seal=seal)

    def write_text(self, caption: str, tensors: Mapping[str, Tensor]) -> str:
        """Keep a caption's embedding, without the batch dimension; returns its seal."""
        kept = {name: narrowest(tensor) for name, tensor in tensors.items()}
        return write_sealed(self.text_path(caption), kept, key=self.text_key(caption))

    def latent_seal(self, key: str, *, verify: bool) -> str | None:
        """Seal of a clip's latents; None where they are missing or damaged, which is said.

        Args:
            key: Key of the latents.
            verify: Read the values too.
        """
        return _seal(self.latent_path(key), key=key, verify=verify)

    def text_seal(self, caption: str, *, verify: bool) -> str | None:
        """Seal of a caption's embedding; None where it is missing or damaged, which is said."""
        return _seal(self.text_path(caption), key=self.text_key(caption), verify=verify)

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The embeddings of captions that are in the cache, as a family's ``encode`` gives them: float32, B rows each.

        Raises:
            UserError: A caption is not in the cache, or its file is damaged.
        """
        rows = [_read(self.text_path(caption), key=self.text_key(caption), seal=None) for caption in captions]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def narrowest(tensor: Tensor) -> Tensor:
    """The tensor as bfloat16 or float16 where that is the same bit for bit: what a half-precision encoder gave."""
    for dtype in (torch.bfloat16, torch.float16):
        narrow = tensor.to(dtype)
        if tensor.dtype == torch.float32 and torch.equal(narrow.float().view(torch.int32), tensor.view(torch.int32)):
            return narrow
    return tensor


def _read(path: Path, *, key: str, seal: str | None) -> dict[str, Tensor]:
    """Tensors of a sealed file, floats as float32; raises UserError with the remedy."""
    try:
        tensors = read_sealed(path, key=key, seal=seal)
    except FileNotFoundError as error:
        raise UserError(f"{path} is not in the cache; run qvgen precompute with the same settings again") from error
    except DamagedFileError as error:
        raise UserError(f"{error}; run qvgen precompute with the same settings, which makes it again") from error
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _seal(path: Path, *, key: str, verify: bool) -> str | None:
    try:
        seal = read_seal(path, key=key)
        if verify:
            read_sealed(path, key=key, seal=seal)
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        log.warning("%s; it is made again", error)
        return None
    return seal


def is_record(record: Any) -> bool:
    """Whether a value has the form of a row's record; keys in it become names of files."""
    if not isinstance(record, dict):
        return False
    if record.keys() == {"bad", "again"}:
        return isinstance(record["bad"], str) and isinstance(record["again"], bool)
    return (
        record.keys() == {"clip", "latents", "bucket", "latents_sha256", "text_sha256", "left_out"}
        and is_left_out(record["left_out"])
        and isinstance(record["bucket"], str)
        and all(_is_digest(record[name]) for name in ("clip", "latents", "latents_sha256", "text_sha256"))
    )


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def read_json(path: Path, *, expected: Callable[[Any], bool]) -> Any:
    """A JSON file's value if it has the form that is expected; None where it has not or there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return value if expected(value) else None
