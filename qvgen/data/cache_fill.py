"""From a table of clips to a full cache: resumable at every clip, shared out over processes, the same whatever the cut is.

    row -> record there? -> hash the bytes, cut (ahead, in worker processes) -> latents there? -> VAE -> write
                                                                             -> text there?    -> text encoder -> write
        -> record; all rows have one -> report of bad clips, index

Process r of n takes rows r, r + n, r + 2n, ...; who comes last finds a record for every row and writes the index, with the
same bytes whoever it is. A killed process loses the clip that it was at: what is on the disk is whole, and records come last.

One clip and one caption are encoded at a time: a content never depends on batch mates.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from qvgen.config.value_range import Range, check_ranges
from qvgen.data.cache_index import IndexRows, keep_state, state_of, write_index
from qvgen.data.cached_clips import files_of
from qvgen.data.captions import Clip, ClipTable
from qvgen.data.clip_process import TIMEOUT_S
from qvgen.data.clip_report import (
    CountTokens,
    FillReport,
    describe_left_out,
    left_out,
    left_out_path,
    report_bad,
    too_many_bad,
    warn_of_cut_captions,
    write_left_out,
)
from qvgen.data.clips import to_pixels
from qvgen.data.clips_ahead import ClipsAhead, ReadClip, Unreadable
from qvgen.data.latent_cache import LatentCache

log = logging.getLogger(__name__)

EncodeVideo = Callable[[Tensor], Tensor]
"""float32 [1, 3, F, H, W] in [-1, 1] -> latents [1, C, f, h, w]."""

EncodeCaptions = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Captions -> named tensors with a row for each."""

_Encoders = tuple[EncodeVideo, EncodeCaptions, CountTokens]

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
    options: FillOptions | None = None,
) -> FillReport:
    """Do what is missing of this process's share of a table.

    Args:
        cache: The cache.
        table: Clips and captions.
        encode_video: float32 [1, 3, F, H, W] in [-1, 1] -> latents [1, C, f, h, w]; a pure function.
        encode_captions: Captions -> named tensors with one row each; a pure function.
        tokens_left_out: Caption -> how many of its tokens ``encode_captions`` leaves out.
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
    encoders = (encode_video, encode_captions, tokens_left_out)
    _ensure_prompts(cache, options.captions, encoders=encoders)
    counts = {"encoded": 0, "reused": 0}
    checked: dict[str, str | None] = {}
    bad: list[tuple[str, str]] = []
    mine = range(options.shard, len(table), options.num_shards)
    last_log = time.monotonic()
    with ClipsAhead(cache.settings.cut, readers=options.readers, timeout_s=options.timeout_s) as ahead:
        rows = ((clip, _record(cache, clip, checked=checked)) for clip in map(table.__getitem__, mine))
        for done, (clip, known) in enumerate(ahead.in_order(rows)):
            record = _settle(cache, clip, known, encoders=encoders, counts=counts)
            if "bad" in record:
                bad.append((clip.name, record["bad"]))
                if too_many_bad(len(bad), total=len(table), max_bad=options.max_bad):
                    break  # nothing that follows can mend it
            if time.monotonic() - last_log > _LOG_EVERY_S:
                last_log = time.monotonic()
                log.info("%d of %d clips: %d encoded, %d bad", done + 1, len(mine), counts["encoded"], len(bad))
    if too_many_bad(len(bad), total=len(table), max_bad=options.max_bad):
        report_bad(bad, total=len(table), max_bad=options.max_bad, report=report_path)
    rows = _write_index(cache, table, index_path=index_path, report=report_path, max_bad=options.max_bad)
    return FillReport(
        bad=tuple(bad),
        complete=rows is not None,
        bad_report=report_path,
        left_out="" if rows is None else describe_left_out(rows),
        left_out_report=left_out_path(index_path),
        **counts,
    )


def remove_stale(folder: Path) -> None:
    """Delete half-written files that killed processes left more than an hour ago."""
    for path in folder.rglob(".*.tmp"):
        try:
            if time.time() - path.stat().st_mtime > STALE_S:
                path.unlink(missing_ok=True)
        except FileNotFoundError:  # its writer has renamed it, or another process was faster
            continue


def _is_settled(cache: LatentCache, record: Mapping[str, Any], clip: Clip, *, checked: dict[str, str | None]) -> bool:
    """Whether a row needs nothing any more: its files are as they were written, or it is bad for a reason in the clip.

    Args:
        cache: The cache.
        record: The row's record: all that is known of it.
        clip: The row.
        checked: Seals of files that were read before: clips and captions of several rows are read once.
    """
    if "bad" in record:
        return not record["again"]
    key, text_key = record["latents"], cache.text_key(clip.caption)
    if key not in checked:
        checked[key] = cache.latent_seal(key, verify=True)
    if text_key not in checked:
        checked[text_key] = cache.text_seal(clip.caption, verify=True)
    return checked[key] == record["latents_sha256"] and checked[text_key] == record["text_sha256"]


def _record(cache: LatentCache, clip: Clip, *, checked: dict[str, str | None]) -> dict[str, Any] | None:
    """A row's record where the row needs nothing any more; None where its clip has to be read."""
    record = cache.read_record(cache.row_key(clip))
    return record if record is not None and _is_settled(cache, record, clip, checked=checked) else None


def _settle(
    cache: LatentCache,
    clip: Clip,
    known: dict[str, Any] | Future[ReadClip | Unreadable],
    *,
    encoders: _Encoders,
    counts: dict[str, int],
) -> dict[str, Any]:
    """Do what is missing of a row, whose record is known or whose clip is read; returns its record."""
    if not isinstance(known, Future):
        counts["reused"] += "latents" in known
        return known
    record = _make(cache, clip, known.result(), encoders=encoders, counts=counts)
    cache.write_record(cache.row_key(clip), record)
    return record


def _make(
    cache: LatentCache, clip: Clip, read: ReadClip | Unreadable, *, encoders: _Encoders, counts: dict[str, int]
) -> dict[str, Any]:
    """Latents and embedding of a clip, unless they are there; returns its record."""
    encode_video, encode_captions, tokens_left_out = encoders
    if isinstance(read, Unreadable):
        log.warning("%s: %s", clip.name, read.reason)
        return {"bad": read.reason, "again": read.again}
    key = cache.latent_key(read.sha256, read.cut)
    seal = cache.latent_seal(key, verify=True)
    if seal is not None:
        counts["reused"] += 1
    else:
        latents = encode_video(to_pixels(read.frames)[None])
        _check(latents, what=f"encode_video, on {clip.name},")
        seal = cache.write_latents(key, latents[0])
        counts["encoded"] += 1
    text_seal = _ensure_text(cache, clip.caption, encode_captions=encode_captions)
    return {
        "clip": read.sha256,
        "latents": key,
        "bucket": read.cut.bucket.label,
        "latents_sha256": seal,
        "text_sha256": text_seal,
        "left_out": left_out(read.cut, tokens=tokens_left_out(clip.caption)),
    }


def _ensure_prompts(cache: LatentCache, captions: Sequence[str], *, encoders: _Encoders) -> None:
    """Encode captions that belong to no clip, the empty one too; says which ones are too long."""
    _, encode_captions, tokens_left_out = encoders
    warn_of_cut_captions(captions, tokens_left_out=tokens_left_out)
    for caption in dict.fromkeys(["", *captions]):
        _ensure_text(cache, caption, encode_captions=encode_captions)


def _ensure_text(cache: LatentCache, caption: str, *, encode_captions: EncodeCaptions) -> str:
    """Encode a caption unless its embedding is there, as it was written; returns its seal."""
    seal = cache.text_seal(caption, verify=True)
    if seal is not None:
        return seal
    tensors = encode_captions([caption])
    for name, tensor in tensors.items():
        _check(tensor, what=f"encode_captions, on {caption!r}, in {name}")
    return cache.write_text(caption, {name: tensor[0] for name, tensor in tensors.items()})


def _check(tensor: Tensor, *, what: str) -> None:
    """One row, all finite: a VAE in float16 may overflow, and one such clip would spoil a whole training."""
    if len(tensor) != 1:
        raise ValueError(f"{what} gave {list(tensor.shape)}; its first size must be 1")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{what} gave values that are not finite; run it in float32 or bfloat16")


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
