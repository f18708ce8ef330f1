"""The video files of a folder as cases of an evaluation, and whether two folders hold the same cases.

    03-a-red-boat-seed42-packed.mp4      as `qvgen generate` names them: prompt 3 of a list, its words, seed, kind of model
    a red boat-0.mp4                     as VBench names them, where its list of prompts is given: prompt and number
    anything-else.mp4                    one prompt to each file

The kind of model at the end belongs to no name, so a packed model's videos pair with the teacher's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from qvgen.config.prompts.prompt import PromptedVideo, Prompts
from qvgen.errors import UserError
from qvgen.evaluation.comparison import VARIANTS, prompt_name
from qvgen.evaluation.suite.case import Case, shown_names
from qvgen.evaluation.suite.clip_store import FolderClips

SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm", ".webp")

_RATE_TOLERANCE = 1e-3
"""Rates are fractions of whole numbers in some containers: 29.97 is 30000/1001."""

_KIND = re.compile(rf"-({'|'.join(VARIANTS)})$")
_NUMBERED = re.compile(r"(?P<caption>.+)-(?P<number>\d+)$")
_NAMED = re.compile(r"(?P<prompt>\d+-.+)-seed(?P<seed>\d+)$")


def read_folder(folder: Path, *, key: str) -> FolderClips:
    """The video files of a folder.

    Args:
        folder: The folder.
        key: Whose value it is, for messages.

    Raises:
        UserError: It is no folder, holds no video, or two of one name: videos of two models.
    """
    if not folder.is_dir():
        raise UserError(f"{key}={folder} is no folder; name one that holds video files")
    files: dict[str, Path] = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES):
        name = _KIND.sub("", path.stem)
        if name in files:
            raise UserError(
                f"{key}={folder} holds two videos of one name, {files[name].name} and {path.name}; put the videos of "
                "each model into a folder of their own"
            )
        files[name] = path
    if not files:
        raise UserError(f"{key}={folder} holds no video ({', '.join(SUFFIXES)})")
    return FolderClips(files)


def folder_cases(
    clips: FolderClips,
    prompts: Prompts | None,
    *,
    key: str,
    seeds: int | None,
    negative: str,
    captions: Collection[str] = (),
) -> list[Case]:
    """The cases of a folder's files, in the order of their names.

    Args:
        clips: The files.
        prompts: What they were made from; None: nobody said it.
        key: Whose value the folder is, for messages.
        seeds: Number of videos that each prompt has to have; None: any, the same for all.
        negative: Negative prompt of the prompts that name none.
        captions: Captions of VBench's list; empty: there is none.

    Raises:
        UserError: Files and prompts do not match, by name.
    """
    found = {name: _NAMED.fullmatch(name) for name in clips.files}
    odd = [name for name, match in found.items() if match is None]
    if prompts is None:
        if odd and captions:
            return _of_list(list(found), captions, key=key)
        if odd:
            return [Case(name=name, prompt=number, seed=None, caption=None) for number, name in enumerate(found)]
        numbers: dict[str, int] = {}
        return [
            Case(
                name=name,
                prompt=numbers.setdefault(match["prompt"], len(numbers)),
                seed=int(match["seed"]),
                caption=None,
            )
            for name, match in found.items()
            if match is not None
        ]
    if odd:
        raise UserError(
            f"{key}: {shown_names(odd)} can't be matched with prompts; name videos as `qvgen generate` does, "
            "03-WORDS-seed42.mp4, or leave prompts out"
        )
    return _matched(found, prompts, key=key, seeds=seeds, negative=negative)


def _of_list(names: Sequence[str], captions: Collection[str], *, key: str) -> list[Case]:
    """The cases of files that VBench's list of prompts names, PROMPT-NUMBER."""
    matches = {name: _NUMBERED.fullmatch(name) for name in names}
    if odd := [name for name, match in matches.items() if match is None or match["caption"] not in captions]:
        raise UserError(
            f"{key}: {shown_names(odd)} can't be matched with vbench.info; name videos as VBench does, PROMPT-0.mp4, or "
            "as `qvgen generate` does, with prompts=FILE"
        )
    numbers: dict[str, int] = {}
    return [
        Case(name=name, prompt=numbers.setdefault(match["caption"], len(numbers)), seed=None, caption=match["caption"])
        for name, match in matches.items()
        if match is not None
    ]


def _matched(
    found: dict[str, re.Match[str] | None], prompts: Prompts, *, key: str, seeds: int | None, negative: str
) -> list[Case]:
    lines = {prompt_name(number, line.caption): (number, line) for number, line in enumerate(prompts.lines)}
    cases, counts = [], dict.fromkeys(lines, 0)
    for name, match in found.items():
        assert match is not None, "odd names were refused"
        if match["prompt"] not in lines:
            raise UserError(f"{key}: {name} is of no line of prompts; they would begin with {shown_names(list(lines))}")
        number, line = lines[match["prompt"]]
        asked = PromptedVideo(
            caption=line.caption,
            seed=int(match["seed"]),
            negative=negative if line.negative is None else line.negative,
        )
        counts[match["prompt"]] += 1
        cases.append(Case(name=name, prompt=number, seed=asked.seed, caption=line.caption, asked=asked))
    wanted = max(counts.values()) if seeds is None else seeds
    short = [f"{name} ({count} of {wanted})" for name, count in counts.items() if count != wanted]
    if short:
        raise UserError(f"{key} lacks videos of prompts, or has too many: {shown_names(short)}")
    return cases


def of_subset(cases: Sequence[Case], captions: Collection[str], *, key: str) -> list[Case]:
    """The cases whose captions are in a part of VBench's list.

    Args:
        cases: All cases.
        captions: Captions of the part.
        key: Where the cases come from, for messages.

    Raises:
        UserError: A caption of the part has no video, or nobody said what the videos were made from.
    """
    there = {case.caption for case in cases}
    if missing := [caption for caption in captions if caption not in there]:
        raise UserError(
            f"{key}: {len(missing)} of the {len(captions)} prompts that vbench.subset chooses are not there, the first of "
            f"them {missing[0]!r}"
        )
    return [case for case in cases if case.caption in captions]


def check_names(names: Sequence[str], files: FolderClips, *, key: str) -> None:
    """Raise UserError where a folder lacks videos of these names, or has others."""
    if missing := [name for name in names if name not in files.files]:
        raise UserError(f"{key} lacks {len(missing)} of the {len(names)} videos: {shown_names(missing)}")
    if extra := [name for name in files.files if name not in set(names)]:
        raise UserError(f"{key} holds {len(extra)} videos that belong to nothing: {shown_names(extra)}")


def check_rate(files: FolderClips, fps: float, *, key: str) -> None:
    """Raise UserError, by name, where a file has another rate than the videos of the model that it is compared with."""
    for name in files.files:
        found = float(files.probe(name).fps)
        if abs(found - fps) > _RATE_TOLERANCE * fps:
            raise UserError(f"{key}: {name} has {found:g} frames a second, and the model's videos {fps:g}")


def check_same(videos: FolderClips, reference: FolderClips) -> None:
    """Raise UserError, by name, where two folders hold different cases, or videos of other sizes, lengths or rates."""
    check_names(list(videos.files), reference, key="reference")
    for name in videos.files:
        one, other = videos.probe(name), reference.probe(name)
        facts = {
            "frames": (one.num_frames, other.num_frames),
            "pixels": (f"{one.width}x{one.height}", f"{other.width}x{other.height}"),
            "frames a second": (f"{float(one.fps):g}", f"{float(other.fps):g}"),
        }
        for what, (here, there_) in facts.items():
            if here != there_:
                raise UserError(
                    f"{name}: the video has {here} {what} and the reference {there_}; compare videos of one shape and rate"
                )
