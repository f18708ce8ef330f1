"""WebDataset: tar archives of clips, ``0001.mp4`` beside ``0001.txt`` or ``0001.json``, read where they lie.

Nothing is unpacked: a clip is a place within an archive, and its name in there is never a path of this machine. A
sample's files have one name up to the first dot; its caption is the .txt file, or a key of the .json file.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qvgen.data.tables.columns import CAPTION_COLUMNS, Columns, choose_caption
from qvgen.data.tables.rows import Member, Rows, as_text, first_few
from qvgen.data.tables.text_file import check_is_here
from qvgen.data.tables.text_pairs import VIDEO_SUFFIXES
from qvgen.errors import UserError

_LARGEST_TEXT = 2**24
"""Bytes of a caption's file."""


def read(archives: Sequence[Path], *, wished: Columns) -> Rows:
    """Read the index and the captions of archives.

    Args:
        archives: In the order of their rows.
        wished: ``caption`` is an extension, such as txt, or a key of the .json files.

    Raises:
        UserError: An archive is damaged or compressed, or holds a file twice; or no sample has a video and a caption.
    """
    names: list[str] = []
    captions: list[str] = []
    members: list[Member] = []
    left_out: list[str] = []
    for archive in archives:
        for key, sample in _samples(archive).items():
            videos = [extension for extension in sample if _is_video(extension, wish=wished.video)]
            if not videos:
                left_out.append(f"{archive.name}: {key}")
                continue
            where = f"{archive}, {key}"
            if len(videos) > 1:
                keys = " or ".join(f"data.video_column={extension}" for extension in videos)
                raise UserError(f"{where} has the videos {', '.join(videos)}; write {keys}")
            names.append(as_text(f"{archive.name}/{key}.{videos[0]}", where=str(archive), column="a file's name"))
            captions.append(_caption(sample, wish=wished.caption, where=where))
            members.append(sample[videos[0]])
    if not names:
        raise UserError(f"{archives[0]} holds no videos; give archives with 0001.mp4 beside 0001.txt or 0001.json")
    notes = (f"left out are samples without a video: {len(left_out)} ({first_few(left_out)})",) if left_out else ()
    count = f"{len(archives)} WebDataset archives" if len(archives) > 1 else "WebDataset archive"
    return Rows(names=names, captions=captions, what=count, folder=None, members=members, notes=notes)


def _samples(archive: Path) -> Mapping[str, Mapping[str, Member]]:
    """Name of a sample -> extension -> where its bytes are."""
    samples: dict[str, dict[str, Member]] = {}
    try:
        check_is_here(archive)
        with tarfile.open(archive, "r:") as tar:
            for info in tar:
                folder, _, file = info.name.rpartition("/")
                if not info.isreg() or info.issparse() or file.startswith("."):
                    continue
                stem, _, extension = file.partition(".")
                sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
                if extension.lower() in sample:
                    raise UserError(f"{archive} holds {info.name!r} twice; write it again with each file once")
                sample[extension.lower()] = Member(archive=archive, offset=info.offset_data, size=info.size)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{archive} can't be read as a tar archive: {error}; if it is compressed, unpack it with gunzip"
        ) from error
    return samples


def _is_video(extension: str, *, wish: str | None) -> bool:
    return extension == wish.lower().lstrip(".") if wish else f".{extension}" in VIDEO_SUFFIXES


def _caption(sample: Mapping[str, Member], *, wish: str | None, where: str) -> str:
    """The caption of a sample; empty where it has none."""
    extension = wish.lower().lstrip(".") if wish else "txt"
    if extension in sample and extension != "json":
        return as_text(_text(sample[extension], where=f"{where}.{extension}"), where=where, column=extension).strip()
    if "json" not in sample:
        return ""
    content = _json(sample["json"], where=f"{where}.json")
    if wish is None and not any(name in content for group in CAPTION_COLUMNS for name in group):
        return ""
    key = choose_caption(list(content), wished=Columns(caption=wish), where=f"{where}.json")
    return as_text(content[key], where=f"{where}.json", column=key).strip()


def _json(member: Member, *, where: str) -> Mapping[str, Any]:
    try:
        content = json.loads(_text(member, where=where))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where} is no JSON; write an object with the caption") from error
    if not isinstance(content, dict):
        raise UserError(f"{where} holds no JSON object; write one with the caption")
    return content


def _text(member: Member, *, where: str) -> str:
    if member.size > _LARGEST_TEXT:
        raise UserError(f"{where} has {member.size} bytes, too many for a caption; write the caption alone")
    try:
        return member.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8; write the archive again with its texts as UTF-8") from error
