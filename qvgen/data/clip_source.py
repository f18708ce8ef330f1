"""``data=clips``: a user's own videos and captions, seen by the training as latents and embeddings of a cache.

    data.path --read_table--> rows --fill (once)--> LatentCache --open--> latents, embeddings, one bucket per batch

What belongs to whom: rate, buckets and limits are this source's; VAE, text encoder and their content keys are the family's
(:class:`LatentFamily`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Protocol

from torch import Tensor

from qvgen.config.schema.may_differ import MayDiffer
from qvgen.config.schema.value_range import Range, check_ranges
from qvgen.data.cache_fill import MAX_BAD, FillOptions, fill
from qvgen.data.cached_clips import CachedClips
from qvgen.data.captions import ClipTable, read_table
from qvgen.data.clip_report import FillReport, describe_left_out, left_out_path
from qvgen.data.clips import Bucket, CutSettings
from qvgen.data.latent_cache import CacheSettings, LatentCache, content_key
from qvgen.data.source import EncodedSource, Family, Split
from qvgen.data.tables.columns import Columns
from qvgen.errors import UserError


class LatentFamily(Family, Protocol):
    """The part of a family with latents that this source needs; :class:`qvgen.models.base.LatentVideoDiT` has it all.

    One that is told a clip's first frame has ``encode_first_frame`` besides, and ``image_condition_shapes`` of what that
    gives (:mod:`qvgen.models.image_family`).
    """

    height: int
    width: int
    num_frames: int
    fps: int

    @property
    def latent_revision(self) -> str:
        """Content key of whatever decides :meth:`encode_video`."""

    @property
    def text_revision(self) -> str:
        """Content key of whatever decides ``encode``."""

    def check_clip(self, *, frames: int, height: int, width: int) -> None:
        """Raise ValueError for a size that VAE and patches do not divide."""

    def tokens_left_out(self, caption: str) -> int:
        """How many of a caption's tokens ``encode`` leaves out."""

    def encode_video(self, pixels: Tensor) -> Tensor:
        """Clips float32 [1, 3, F, H, W] in [-1, 1] -> latents [1, C, f, h, w]."""


@dataclass(frozen=True, kw_only=True)
class ClipSource(EncodedSource):
    """Clips of a table.

    Attributes:
        path: Folder of videos with metadata.csv (file_name,text), or another of the forms of docs/data.md.
        videos: Folder that the table's names start from; None: the table's own, its ``videos``, or the working one.
        video_column: The table's column of videos; None: whichever of the known names it has.
        caption_column: The table's column of captions; None: whichever of the known names it has.
        cache: Folder of latents and embeddings, keyed by content; any number of runs and models may share it.
        fps: Frames per second that clips are cut at; None: the model's.
        buckets: Shapes of the clips, frames x height x width, for example [49x480x720,49x720x480]; all clips of a batch
            have the same one. None: the model's own size alone.
        max_bad: Share of the clips that may be broken, too short or too small; they are listed in a file.
        held_out: Clips that are kept from training to measure on; at most a tenth of all, at least one.
        timeout_s: Seconds that reading one file may take.
        readers: Processes that cut clips while the VAE encodes those before them, for each process that encodes; they
            change no bit. Each holds the frames of one clip.
    """

    path: Annotated[str | None, MayDiffer.FREE]
    videos: Annotated[str | None, MayDiffer.FREE]
    cache: Annotated[str, MayDiffer.FREE]
    fps: float | None
    buckets: Sequence[str] | None
    max_bad: Annotated[float, MAX_BAD]
    held_out: Annotated[int, Range("> 0")]
    timeout_s: Annotated[float, Range("> 0")]
    video_column: str | None = None
    caption_column: str | None = None
    readers: Annotated[int, Range("> 0"), MayDiffer.FREE] = 2

    def __post_init__(self) -> None:
        check_ranges(self, section="data")
        if self.buckets is not None:
            _parse(self.buckets)

    @property
    def is_given(self) -> bool:
        """Whether ``path`` is set."""
        return self.path is not None

    @property
    def origin(self) -> str:
        """The table's path."""
        return str(self.path)

    def num_clips(self) -> int | None:
        """Rows of the table."""
        return len(self.table()) if self.is_given else None

    def summary(self) -> list[str]:
        """The table's form, and what is missing of it."""
        return self.table().summary() if self.is_given else []

    def check(self, family: Any) -> None:
        """Raise ValueError where the family has no latents, or a bucket does not fit its VAE and patches."""
        if not hasattr(family, "encode_video"):
            raise UserError(
                f"data=clips needs a model with a VAE, which model={family.name} has not; choose data=moving_digits"
            )
        for bucket in self.cut_settings(family).buckets:
            try:
                family.check_clip(frames=bucket.frames, height=bucket.height, width=bucket.width)
            except ValueError as error:
                raise UserError(f"data.buckets: {error}") from error

    def cut_settings(self, family: LatentFamily) -> CutSettings:
        """The rate and the shapes to which clips are cut."""
        own = Bucket(frames=family.num_frames, height=family.height, width=family.width)
        buckets = (own,) if self.buckets is None else _parse(self.buckets)
        return CutSettings(fps=float(family.fps if self.fps is None else self.fps), buckets=buckets)

    def table(self) -> ClipTable:
        """The table of clips, as it was when it was first asked for.

        Raises:
            UserError: ``path`` is not set, or see :func:`qvgen.data.captions.read_table`.
        """
        return self._table

    @cached_property
    def _table(self) -> ClipTable:
        """Read once: a run opens its table several times, and must not see two states of it."""
        if self.path is None:
            raise UserError(
                "data.path is missing; write data.path=FOLDER with videos and metadata.csv (file_name,text)"
            )
        columns = Columns(video=self.video_column, caption=self.caption_column)
        return read_table(self.path, videos=self.videos, columns=columns)

    def latent_cache(self, family: LatentFamily) -> LatentCache:
        """The cache under this source's and the family's settings; raises ValueError where the family has no weights."""
        return LatentCache(
            Path(self.cache).expanduser(),
            settings=CacheSettings(
                cut=self.cut_settings(family),
                vae_revision=family.latent_revision,
                text_revision=family.text_revision,
            ),
        )

    def identity(self, family: LatentFamily) -> dict[str, str]:
        """The usable clips with their captions, and what the cache has for them; see :mod:`qvgen.data.source`."""
        cache = self.latent_cache(family)
        columns = self._cached(cache).rows.columns
        clips = content_key("clips", columns["clip"], columns["caption"])
        # All that the index says of the rows but their names: the cut, the VAE, whatever else decides the latents.
        latents = content_key("latents", {name: column for name, column in columns.items() if name != "name"})
        captions = content_key("captions", cache.settings.text_revision)
        return {"clips": f"{len(columns['row'])} clips, {clips}", "latents": latents, "captions": captions}

    def is_complete(self, family: LatentFamily, *, captions: Sequence[str]) -> bool:
        """Whether the cache holds every clip of the table, and these captions too."""
        cache = self.latent_cache(family)
        if not all(cache.text_seal(caption, verify=False) for caption in captions):
            return False
        return self._open(cache) is not None

    def fill(self, family: LatentFamily, *, captions: Sequence[str], shard: int = 0, num_shards: int = 1) -> FillReport:
        """Do what is missing of a share of the cache; see :func:`qvgen.data.cache_fill.fill`."""
        options = FillOptions(
            shard=shard,
            num_shards=num_shards,
            max_bad=self.max_bad,
            timeout_s=self.timeout_s,
            readers=self.readers,
            captions=tuple(captions),
        )
        cache = self.latent_cache(family)
        return fill(
            cache,
            self.table(),
            encode_video=family.encode_video,
            encode_captions=family.encode,
            tokens_left_out=family.tokens_left_out,
            encode_first_frame=getattr(family, "encode_first_frame", None),
            options=options,
        )

    def describe_share(self, family: Any, *, shard: int, num_shards: int) -> list[str]:
        """Lines of a plan: the clips of a share, how they are cut, what is missing, and the space on the disk."""
        table, cut = self.table(), self.cut_settings(family)
        mine = range(shard, len(table), num_shards)
        lines = [
            f"{len(table)} clips in {self.path}, {len(mine)} of them in this share",
            *table.summary(),
            f"cut at {cut.fps:g} frames per second to {', '.join(bucket.label for bucket in cut.buckets)}",
        ]
        if family.path is None:
            lines.append("nothing is known about the cache: model.path is missing")
        else:
            cache = self.latent_cache(family)
            done = sum(cache.read_record(cache.row_key(table[row])) is not None for row in mine)
            lines.append(f"{done} clips are done, {len(mine) - done} are missing in {self.cache}")
        tokens, channels = family.condition_shape
        image = sum(map(math.prod, getattr(family, "image_condition_shapes", {}).values()))
        latents = (math.prod(family.sample_shape) + image) * _bytes_per_value(family.vae_dtype)
        embedding = tokens * channels * _bytes_per_value(family.text_encoder_dtype)
        lines.append(
            f"disk: {len(table) * (latents + embedding) / 1e9:.2f} GB at most ({latents / 1e6:.2f} MB of latents per clip "
            f"of the model's size, {embedding / 1e6:.2f} MB per caption)"
        )
        return lines

    def open(self, family: LatentFamily, *, split: str) -> Split:
        """The samples of a split.

        Raises:
            UserError: The cache lacks some, or the split is empty.
        """
        cache = self.latent_cache(family)
        everything = self._cached(cache)
        different = len(set(everything.rows.columns["clip"]))
        if different < 2:
            raise UserError(f"data.path={self.path} has {different} usable clip; give two or more, one to measure on")
        held_out = max(1, min(self.held_out, different // 10))
        clips = CachedClips(cache, everything.rows, split=split, held_out=held_out)
        return Split(
            samples=clips,
            buckets=clips.buckets,
            encode=cache.encode,
            num_clips=len(set(clips.rows.columns["clip"])),
            left_out=f"{describe_left_out(clips.rows)}; see {left_out_path(cache.index_path(self.table()))}",
        )

    def _cached(self, cache: LatentCache) -> CachedClips:
        """All samples of the table; raises UserError where the cache lacks some."""
        everything = self._open(cache)
        if everything is None:
            raise UserError(f"data.cache={self.cache} does not hold all of {self.path}; run qvgen precompute first")
        return everything

    def _open(self, cache: LatentCache) -> CachedClips | None:
        """All samples of the table, looked at once in this process; None as long as the cache lacks some."""
        if cache.settings not in self._opened:
            everything = CachedClips.open(cache, self.table(), max_bad=self.max_bad)
            if everything is None:
                return None
            self._opened[cache.settings] = everything
        return self._opened[cache.settings]

    @cached_property
    def _opened(self) -> dict[CacheSettings, CachedClips]:
        return {}


def _bytes_per_value(dtype: str) -> int:
    """Bytes of a number in the cache, which narrows where no bit is lost."""
    return 4 if dtype == "float32" else 2


def _parse(buckets: Sequence[str]) -> tuple[Bucket, ...]:
    return tuple(Bucket.parse(str(text)) for text in buckets)
