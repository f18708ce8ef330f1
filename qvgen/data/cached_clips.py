"""Samples of a table whose latents all lie in a cache: what training reads in place of videos."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import nsmallest
from typing import NotRequired, TypedDict

from torch import Tensor
from torch.utils.data import Dataset

from qvgen.data.cache_index import IndexRows, keep_state, read_index, read_state, state_of
from qvgen.data.captions import ClipTable
from qvgen.data.clip_report import too_many_bad
from qvgen.data.latent_cache import FIRST_FRAME, LatentCache, content_key
from qvgen.data.source import SPLITS
from qvgen.errors import UserError


class CachedClip(TypedDict):
    """One sample.

    Attributes:
        video: float32 [C, f, h, w], latents.
        caption: Text of the clip; :meth:`LatentCache.encode` has its embedding.
        sample_id: The clip's row in its table.
        image: uint8 [H, W, 3], its first frame, for a model that is told it.
        image_condition: What the frame became: name -> tensor without the batch dimension.
    """

    video: Tensor
    caption: str
    sample_id: int
    image: NotRequired[Tensor]
    image_condition: NotRequired[dict[str, Tensor]]


class CachedClips(Dataset[CachedClip]):
    """Map-style data set of a table whose latents are all in a cache; opens no video.

    A clip that stands in several rows is in one split alone.

    Args:
        cache: Holds the latents.
        rows: Rows of an index.
        split: ``train``, or ``held_out``.
        held_out: How many clips are held out: the first ones by their bytes' checksum, whatever the table's order.

    Attributes:
        rows: The split's own.
        buckets: The bucket of each sample, as 49x480x720.

    Raises:
        UserError: The split is unknown or empty.
    """

    def __init__(self, cache: LatentCache, rows: IndexRows, *, split: str = "train", held_out: int = 0) -> None:
        if split not in SPLITS:
            raise UserError(f"split={split!r} is unknown; use one of {', '.join(SPLITS)}")
        of_row = rows.columns["clip"]
        clips = set(of_row)
        kept_apart = set(nsmallest(held_out, clips, key=lambda clip: content_key("held_out", clip)))
        self.rows = rows.chosen([i for i, clip in enumerate(of_row) if (clip in kept_apart) == (split == "held_out")])
        if not self.rows:
            raise UserError(f"no clip is left for split={split}: held_out={held_out} of {len(clips)} different clips")
        self.cache = cache
        self.buckets: list[str] = list(self.rows.columns["bucket"])

    @classmethod
    def open(
        cls, cache: LatentCache, table: ClipTable, *, max_bad: float, split: str = "train", held_out: int = 0
    ) -> CachedClips | None:
        """The table's samples, or None where the cache does not hold all of them yet, each with its seal.

        Raises:
            UserError: More of the table's clips are bad than ``max_bad``; or see the class.
        """
        index_path = cache.index_path(table)
        index = read_index(index_path)
        if index is None:
            return None
        rows, bad = index
        if too_many_bad(len(bad), total=len(table), max_bad=max_bad):
            raise UserError(f"{len(bad)} of {len(table)} clips can't be used, more than max_bad={max_bad:g}")
        state = state_of(files_of(cache, rows))
        if state is None:
            return None
        if state != read_state(index_path):
            if not _have_their_seals(cache, rows):
                return None
            keep_state(index_path, state)
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
        tensors = self.cache.read_clip(row["latents"], seal=row["latents_sha256"])
        clip = CachedClip(video=tensors.pop("latents"), caption=row["caption"], sample_id=row["row"])
        if FIRST_FRAME in tensors:
            clip["image"] = tensors.pop(FIRST_FRAME)
            clip["image_condition"] = tensors
        return clip


def files_of(cache: LatentCache, rows: IndexRows) -> Iterator[str]:
    """The files that rows of an index need, each once: latents, embeddings, and that of the empty caption."""
    for kind, column in (("latents", "latents"), ("texts", "text")):
        yield from (cache.file(kind, key) for key in dict.fromkeys(rows.columns[column]))
    yield cache.file("texts", cache.text_key(""))


def _have_their_seals(cache: LatentCache, rows: IndexRows) -> bool:
    """Whether every file has the seal that the index knows; the values are not read."""
    latents, texts = (
        dict(zip(rows.columns[key], rows.columns[seal], strict=True))
        for key, seal in (("latents", "latents_sha256"), ("caption", "text_sha256"))
    )
    return (
        all(cache.latent_seal(key, verify=False) == seal for key, seal in latents.items())
        and all(cache.text_seal(caption, verify=False) == seal for caption, seal in texts.items())
        and cache.text_seal("", verify=False) is not None
    )
