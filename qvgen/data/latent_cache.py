"""Latents of clips and embeddings of captions on the disk, made once, found again by what they were made from.

    FOLDER/latents/ab/KEY.safetensors    {"latents": [C, f, h, w]}   KEY: clip's bytes, frames, box, bucket, VAE
    FOLDER/texts/ab/KEY.safetensors      {"encoder_hidden_states": [T, D], ...}   KEY: caption, text encoder
    FOLDER/records/SETTINGS/ab/ROW.json  what became of one row of a table: its latents' key, or why there are none
    FOLDER/indexes/INDEX.json            all rows of one table under one setting, once each has a record

Keys are SHA-256 of everything that decides the content, so another rate, bucket, VAE or text encoder finds nothing of the
old one, and a moved or copied clip finds its latents. A row's key holds its file's size and date instead of its bytes: a
table that was done is recognized without reading its videos. Every file is written whole or not at all.

Tensors are stored in the narrowest of bfloat16, float16 and their own type that loses no bit, and are read as float32.

Filling it is :mod:`qvgen.data.cache_fill`. Left out: deleting entries that no index needs any more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from qvgen.config.errors import UserError
from qvgen.data.captions import Clip, ClipTable
from qvgen.data.clips import CutPlan, CutSettings, too_many_bad
from qvgen.data.source import SPLITS
from qvgen.run_directory import atomic_write

FORMAT = 1
"""Part of every key; one more when the same settings would give other content."""


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """What the content of a cache depends on, besides clips and captions.

    Attributes:
        cut: Rate and buckets.
        vae_revision: Which VAE, in which arithmetic: whatever changes its latents.
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
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True, allow_nan=False).encode()).hexdigest()


class LatentCache:
    """A folder of latents and embeddings under one setting; any number of processes may read and write it.

    Args:
        folder: Made when something is written.
        settings: What the content depends on.
    """

    def __init__(self, folder: Path | str, *, settings: CacheSettings) -> None:
        self.folder = Path(folder)
        self.settings = settings
        self._settings_key = content_key("settings", asdict(settings))

    def latent_key(self, clip_sha256: str, plan: CutPlan) -> str:
        """Key of the latents of one cut of a clip."""
        return content_key("latents", clip_sha256, asdict(plan), self.settings.vae_revision)

    def text_key(self, caption: str) -> str:
        """Key of a caption's embedding."""
        return content_key("text", caption, self.settings.text_revision)

    def row_key(self, clip: Clip) -> str:
        """Key of a table's row: its name, its caption, and its file's size and date (or bytes)."""
        if clip.data is not None:
            return content_key("row", clip.name, clip.caption, hashlib.sha256(clip.data).hexdigest())
        assert clip.path is not None
        try:
            state = clip.path.stat()
        except OSError:
            return content_key("row", clip.name, clip.caption, None)
        return content_key("row", clip.name, clip.caption, state.st_size, state.st_mtime_ns)

    def index_path(self, table: ClipTable) -> Path:
        """Where the index of a table under this setting is, or will be."""
        rows = hashlib.sha256("".join(self.row_key(clip) for clip in table).encode()).hexdigest()
        return self.folder / "indexes" / f"{content_key('index', self._settings_key, rows)}.json"

    def latent_path(self, key: str) -> Path:
        """The file of some latents."""
        return self.folder / "latents" / key[:2] / f"{key}.safetensors"

    def text_path(self, caption: str) -> Path:
        """The file of a caption's embedding."""
        key = self.text_key(caption)
        return self.folder / "texts" / key[:2] / f"{key}.safetensors"

    def record_path(self, row_key: str) -> Path:
        """The file that says what became of a row."""
        return self.folder / "records" / self._settings_key[:32] / row_key[:2] / f"{row_key}.json"

    def read_record(self, row_key: str) -> dict[str, Any] | None:
        """What became of a row, or None where nothing is known."""
        try:
            record: dict[str, Any] = json.loads(self.record_path(row_key).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return record

    def write_record(self, row_key: str, record: Mapping[str, Any]) -> None:
        """Say what became of a row."""
        path = self.record_path(row_key)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(record, sort_keys=True).encode())

    def read_latents(self, key: str) -> Float[Tensor, "C f h w"]:
        """Latents of a clip, float32.

        Raises:
            UserError: They are not there any more, or the file is damaged.
        """
        return read_tensors(self.latent_path(key))["latents"]

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The embeddings of captions that are in the cache, as a family's ``encode`` gives them: float32, B rows each.

        Raises:
            UserError: A caption is not in the cache.
        """
        rows = [read_tensors(self.text_path(caption)) for caption in captions]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file, atomically, each as narrow as it loses no bit.

    Raises:
        OSError: The file can't be written.
    """
    narrow = {name: _narrowest(tensor.detach().cpu().contiguous()) for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda temporary: save_file(narrow, temporary))


def _narrowest(tensor: Tensor) -> Tensor:
    """The tensor as bfloat16 or float16 where that is the same bit for bit: what a half-precision encoder gave."""
    for dtype in (torch.bfloat16, torch.float16):
        narrow = tensor.to(dtype)
        if tensor.dtype == torch.float32 and torch.equal(narrow.float().view(torch.int32), tensor.view(torch.int32)):
            return narrow
    return tensor


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read what :func:`write_tensors` wrote, floats as float32.

    Raises:
        UserError: It is not there, or it is damaged.
    """
    from safetensors import SafetensorError

    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is not in the cache; run qvgen precompute with the same settings again") from error
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run qvgen precompute again") from error
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


class CachedClip(TypedDict):
    """One sample.

    Attributes:
        video: float32 [C, f, h, w], latents.
        caption: What the clip shows; :meth:`LatentCache.encode` has its embedding.
        sample_id: The clip's row in its table.
    """

    video: Tensor
    caption: str
    sample_id: int


class CachedClips(Dataset[CachedClip]):
    """Map-style data set of a table whose latents are all in a cache; opens no video.

    A clip that stands in several rows is in one split alone.

    Args:
        cache: Holds the latents.
        rows: Rows of an index: ``row``, ``name``, ``caption``, ``clip``, ``latents``, ``bucket``.
        split: ``train``, or ``held_out``.
        held_out: How many clips are held out: the first ones by their bytes' checksum, whatever the table's order.

    Attributes:
        rows: The split's own.
        buckets: The bucket of each sample, as 49x480x720.

    Raises:
        UserError: The split is unknown or empty.
    """

    def __init__(
        self, cache: LatentCache, rows: Sequence[Mapping[str, Any]], *, split: str = "train", held_out: int = 0
    ) -> None:
        if split not in SPLITS:
            raise UserError(f"split={split!r} is unknown; use one of {', '.join(SPLITS)}")
        clips = sorted({row["clip"] for row in rows}, key=lambda clip: content_key("held_out", clip))
        kept_apart = set(clips[:held_out])
        self.rows = [row for row in rows if (row["clip"] in kept_apart) == (split == "held_out")]
        if not self.rows:
            raise UserError(f"no clip is left for split={split}: held_out={held_out} of {len(clips)} different clips")
        self.cache = cache
        self.buckets: list[str] = [row["bucket"] for row in self.rows]

    @classmethod
    def open(
        cls, cache: LatentCache, table: ClipTable, *, max_bad: float, split: str = "train", held_out: int = 0
    ) -> CachedClips | None:
        """The table's samples, or None where the cache does not hold all of them yet.

        Raises:
            UserError: More of the table's clips are bad than ``max_bad``; or see the class.
        """
        try:
            index = json.loads(cache.index_path(table).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        rows, bad = index["rows"], index["bad"]
        if too_many_bad(len(bad), total=len(table), max_bad=max_bad):
            raise UserError(f"{len(bad)} of {len(table)} clips can't be used, more than max_bad={max_bad:g}")
        keys, captions = {row["latents"] for row in rows}, {row["caption"] for row in rows} | {""}
        paths = [*map(cache.latent_path, keys), *map(cache.text_path, captions)]
        if not all(path.is_file() for path in paths):
            return None
        return cls(cache, rows, split=split, held_out=held_out)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.rows)

    def __getitem__(self, index: int) -> CachedClip:
        """Read sample ``index``.

        Raises:
            IndexError: There is no such sample.
            UserError: Its latents are gone.
        """
        row = self.rows[index]
        return CachedClip(video=self.cache.read_latents(row["latents"]), caption=row["caption"], sample_id=row["row"])
