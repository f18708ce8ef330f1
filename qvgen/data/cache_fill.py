"""From a table of clips to a full cache: resumable at every clip, shared out over processes, the same whatever the cut is.

    row -> record there? -> hash the bytes, cut (ahead, in worker processes) -> latents there? -> VAE -> write
                                                                             -> text there?    -> text encoder -> write
        -> record; all rows have one -> report of bad clips, index

Process r of n takes rows r, r + n, r + 2n, ...; who comes last finds a record for every row and writes the index, with the
same bytes whoever it is. Processes that take the same rows, because they were started by themselves, share them out by
claims (:mod:`qvgen.data.claims`): each clip and each caption is encoded once. A killed process loses the clip that it was
at: what is on the disk is whole, and records come last.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from qvgen import work_item
from qvgen.config.schema.value_range import Range, check_ranges
from qvgen.data.cache_index import IndexRows, keep_state, state_of, write_index
from qvgen.data.cache_writer import CacheWriter, EncodeCaptions, EncodeFirstFrame, Encoders, EncodeVideo
from qvgen.data.cached_clips import files_of
from qvgen.data.captions import Clip, ClipTable
from qvgen.data.claim_wait import ClaimWait
from qvgen.data.claims import Claims
from qvgen.data.clip_process import TIMEOUT_S
from qvgen.data.clip_report import (
    CountTokens,
    FillReport,
    describe_left_out,
    left_out_path,
    report_bad,
    too_many_bad,
    write_left_out,
)
from qvgen.data.clips_ahead import ClipsAhead, ReadClip, Unreadable
from qvgen.data.latent_cache import LatentCache

log = logging.getLogger(__name__)

STALE_S = 3600.0
"""Half-written files older than this were left by a killed process."""

_LOG_EVERY_S = 10.0


MAX_BAD = Range("[0, 1]", write="0.05")


@dataclass(frozen=True, kw_only=True)
class FillOptions:
    """How a cache is filled.

    Attributes:
        shard: Which process this is, 0 <= shard < num_shards.
        num_shards: All processes.
        max_bad: Share of the table's clips that may be bad.
        timeout_s: Seconds that one file may take to be read.
        readers: Processes that read clips ahead of the encoders; they change no bit.
        captions: Further captions to encode, for example of validation videos; the empty one always is.
    """

    shard: int = 0
    num_shards: int = 1
    max_bad: Annotated[float, MAX_BAD] = 0.05
    timeout_s: float = TIMEOUT_S
    readers: int = 1
    captions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.shard < self.num_shards:
            raise ValueError(f"shard={self.shard} is not in 0..{self.num_shards - 1}")
        check_ranges(self, section="data")


def fill(
    cache: LatentCache,
    table: ClipTable,
    *,
    encode_video: EncodeVideo,
    encode_captions: EncodeCaptions,
    tokens_left_out: CountTokens = lambda _: 0,
    encode_first_frame: EncodeFirstFrame | None = None,
    options: FillOptions | None = None,
) -> FillReport:
    """Do what is missing of this process's share of a table.

    Args:
        cache: The cache.
        table: Clips and captions.
        encode_video: float32 [1, 3, F, H, W] in [-1, 1] -> latents [1, C, f, h, w]; a pure function.
        encode_captions: Captions -> named tensors with one row each; a pure function.
        tokens_left_out: Caption -> how many of its tokens ``encode_captions`` leaves out.
        encode_first_frame: A clip as above -> what its first frame becomes, named tensors with one row each; a pure function.
        options: Share, limits.

    Returns:
        What was done.

    Raises:
        UserError: More than ``max_bad`` of the table's clips are bad; they are in the report file.
        ValueError: An encoder gave values that are not finite, or another number of rows.
        OSError: The disk is full or can't be written.
    """
    options = options or FillOptions()
    remove_stale(cache.folder)
    index_path = cache.index_path(table)
    report_path = index_path.with_suffix(".bad.csv")
    encoders = Encoders(
        video=encode_video,
        captions=encode_captions,
        tokens_left_out=tokens_left_out,
        first_frame=encode_first_frame,
    )
    mine = [table[row] for row in range(options.shard, len(table), options.num_shards)]
    with Claims(cache.folder, key="data.cache") as claims:
        writer = CacheWriter(cache, claims, encoders)
        writer.make_prompts(options.captions)
        bad = _settle_all(writer, mine, total=len(table), options=options)
    if too_many_bad(len(bad), total=len(table), max_bad=options.max_bad):
        report_bad(bad, total=len(table), max_bad=options.max_bad, report=report_path)
    rows = _write_index(cache, table, index_path=index_path, report=report_path, max_bad=options.max_bad)
    return FillReport(
        bad=tuple(bad),
        complete=rows is not None,
        bad_report=report_path,
        left_out="" if rows is None else describe_left_out(rows),
        left_out_report=left_out_path(index_path),
        encoded=writer.encoded,
        reused=writer.reused,
    )


def _settle_all(
    writer: CacheWriter, clips: Sequence[Clip], *, total: int, options: FillOptions
) -> list[tuple[str, str]]:
    """Do what is missing of some rows, until all are settled, here or by other processes; (name, reason) of the bad ones.

    A row that another process works on is left out, and looked at again behind all others: its record is there then, or
    the process is gone and the row is free.
    """
    bad: list[tuple[str, str]] = []
    last_log = time.monotonic()
    done, left, wait = 0, list(clips), ClaimWait(writer.claims)
    with ClipsAhead(writer.cache.settings.cut, readers=options.readers, timeout_s=options.timeout_s) as ahead:
        while left:
            elsewhere: list[Clip] = []
            for clip, known in ahead.in_order(_known_rows(writer, left, elsewhere=elsewhere)):
                record = _settle(writer, clip, known)
                done += 1
                if "bad" in record:
                    bad.append((clip.name, record["bad"]))
                    if too_many_bad(len(bad), total=total, max_bad=options.max_bad):
                        return bad  # nothing that follows can mend it
                if time.monotonic() - last_log > _LOG_EVERY_S:
                    last_log = time.monotonic()
                    log.info("%d of %d clips: %d encoded, %d bad", done, len(clips), writer.encoded, len(bad))
            if elsewhere and len(elsewhere) < len(left):
                log.info("waiting for %d clips that other processes encode at the moment", len(elsewhere))
            elif elsewhere:
                wait.wait(writer.cache.row_key(elsewhere[0]))
            left = elsewhere
    return bad


def _known_rows(
    writer: CacheWriter, clips: Sequence[Clip], *, elsewhere: list[Clip]
) -> Iterator[tuple[Clip, dict[str, Any] | None]]:
    """Rows with their record, or None for one that this process has claimed; appends to ``elsewhere`` the others'."""
    checked: dict[str, str] = {}
    for clip in clips:
        key = writer.cache.row_key(clip)
        record = _record(writer.cache, clip, checked=checked)
        if record is None and writer.claims.take(key):
            record = _record(writer.cache, clip, checked=checked)  # another process may have been done since
            if record is not None:
                writer.claims.give_back(key)
        elif record is None:
            elsewhere.append(clip)
            continue
        yield clip, record


def remove_stale(folder: Path) -> None:
    """Delete half-written files that killed processes left more than an hour ago."""
    for path in folder.rglob(".*.tmp"):
        try:
            if time.time() - path.stat().st_mtime > STALE_S:
                path.unlink(missing_ok=True)
        except FileNotFoundError:  # its writer has renamed it, or another process was faster
            continue


def _is_settled(cache: LatentCache, record: Mapping[str, Any], clip: Clip, *, checked: dict[str, str]) -> bool:
    """Whether a row needs nothing any more: its files are as they were written, or it is bad for a reason in the clip.

    Args:
        cache: The cache.
        record: The row's record: all that is known of it.
        clip: The row.
        checked: Seals of whole files that were read before: clips and captions of several rows are read once.
    """
    if "bad" in record:
        return not record["again"]
    key, text_key = record["latents"], cache.text_key(clip.caption)
    if key not in checked and (seal := cache.latent_seal(key, verify=True)) is not None:
        checked[key] = seal
    if text_key not in checked and (seal := cache.text_seal(clip.caption, verify=True)) is not None:
        checked[text_key] = seal
    return checked.get(key) == record["latents_sha256"] and checked.get(text_key) == record["text_sha256"]


def _record(cache: LatentCache, clip: Clip, *, checked: dict[str, str]) -> dict[str, Any] | None:
    """A row's record where the row needs nothing any more; None where its clip has to be read."""
    record = cache.read_record(cache.row_key(clip))
    return record if record is not None and _is_settled(cache, record, clip, checked=checked) else None


def _settle(writer: CacheWriter, clip: Clip, known: dict[str, Any] | Future[ReadClip | Unreadable]) -> dict[str, Any]:
    """Do what is missing of a row, whose record is known or whose clip is read; returns its record."""
    if not isinstance(known, Future):
        writer.reused += "latents" in known
        return known
    work_item.begin(f"clip {clip.name}")
    key = writer.cache.row_key(clip)
    record = writer.make(clip, known.result())
    writer.cache.write_record(key, record)
    writer.claims.give_back(key)
    return record


def _write_index(
    cache: LatentCache, table: ClipTable, *, index_path: Path, report: Path, max_bad: float
) -> list[dict[str, Any]] | None:
    """Write reports and index if every row of the table has a record and its files; returns the usable rows, or None.

    The index has the files' present seals: of two processes that encoded one caption at once, the later one's.
    """
    rows: list[dict[str, Any]] = []
    bad: list[tuple[str, str]] = []
    for row, clip in enumerate(table):
        record = cache.read_record(cache.row_key(clip))
        if record is None:
            return None
        if "bad" in record:
            bad.append((clip.name, record["bad"]))
        else:
            seals = {
                "latents_sha256": cache.latent_seal(record["latents"], verify=False),
                "text_sha256": cache.text_seal(clip.caption, verify=False),
            }
            if None in seals.values():
                return None
            own = {"row": row, "name": clip.name, "caption": clip.caption, "text": cache.text_key(clip.caption)}
            rows.append({**own, **record, **seals})
    report_bad(bad, total=len(table), max_bad=max_bad, report=report)
    write_left_out(rows, path=left_out_path(index_path))
    usable = IndexRows.of(rows)
    state = state_of(files_of(cache, usable))
    write_index(index_path, usable, bad=bad)
    if state is not None:
        keep_state(index_path, state)
    return rows
