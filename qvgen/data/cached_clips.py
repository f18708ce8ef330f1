"""Samples of a table whose latents all lie in a cache: what training reads in place of videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from torch import Tensor
from torch.utils.data import Dataset

from qvgen.data.captions import ClipTable
from qvgen.data.clip_report import too_many_bad
from qvgen.data.latent_cache import LatentCache, content_key, is_record, read_json
from qvgen.data.source import SPLITS
from qvgen.errors import UserError


class CachedClip(TypedDict):
    """One sample.

    Attributes:
        video: float32 [C, f, h, w], latents.
        caption: Text of the clip; :meth:`LatentCache.encode` has its embedding.
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
        rows: Rows of an index: ``row``, ``name``, ``caption``, and what :func:`is_record` asks for.
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
        """The table's samples, or None where the cache does not hold all of them yet, each with its seal.

        Raises:
            UserError: More of the table's clips are bad than ``max_bad``; or see the class.
        """
        index = read_json(cache.index_path(table), expected=_is_index)
        if index is None:
            return None
        rows, bad = index["rows"], index["bad"]
        if too_many_bad(len(bad), total=len(table), max_bad=max_bad):
            raise UserError(f"{len(bad)} of {len(table)} clips can't be used, more than max_bad={max_bad:g}")
        latents = {row["latents"]: row["latents_sha256"] for row in rows}
        texts = {row["caption"]: row["text_sha256"] for row in rows}
        whole = (
            all(cache.latent_seal(key, verify=False) == seal for key, seal in latents.items())
            and all(cache.text_seal(caption, verify=False) == seal for caption, seal in texts.items())
            and cache.text_seal("", verify=False) is not None
        )
        if not whole:
            return None
        return cls(cache, rows, split=split, held_out=held_out)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.rows)

    def __getitem__(self, index: int) -> CachedClip:
        """Read sample ``index``.

        Raises:
            IndexError: There is no such sample.
            UserError: Its latents are gone or damaged.
        """
        row = self.rows[index]
        latents = self.cache.read_latents(row["latents"], seal=row["latents_sha256"])
        return CachedClip(video=latents, caption=row["caption"], sample_id=row["row"])


def _is_index(index: Any) -> bool:
    """Whether a value has the form of an index."""
    if not isinstance(index, dict) or index.keys() != {"rows", "bad"} or not isinstance(index["rows"], list):
        return False
    own = ("row", "name", "caption")
    return isinstance(index["bad"], list) and all(
        isinstance(row, dict)
        and isinstance(row.get("row"), int)
        and all(isinstance(row.get(name), str) for name in own[1:])
        and is_record({name: value for name, value in row.items() if name not in own})
        for row in index["rows"]
    )
