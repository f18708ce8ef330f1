"""Prompts as a user gives them: captions, with seeds and negative prompts where a file says so.

    ["a cat", "a dog"]         captions
    FILE.txt                   one caption to a line; any name but *.jsonl; blank lines are left out
    FILE.jsonl                 one object to a line: {"prompt": "a cat", "seed": [1, 2], "negative_prompt": "blurred"}
    [{prompt: a cat, seed: 1}] the same objects, in a YAML file

``seed`` is a number or a list of them, one video for each; without it the run's seeds count. ``negative_prompt`` stands in
place of the model's; ``""`` is none. Files are UTF-8, with or without a byte order mark; lines end in LF, CRLF or CR.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvgen.config.errors import UserError, did_you_mean

KEYS = ("prompt", "seed", "negative_prompt")
"""What a line of a .jsonl file may say."""

_OTHER_FORMATS = (".json", ".csv", ".tsv", ".parquet", ".yaml", ".yml", ".xlsx", ".toml")
_BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One line.

    Attributes:
        caption: What a video is to show.
        seeds: One video for each; empty: the run's seeds count.
        negative: What guidance leads away from; None: the model's own negative prompt.
    """

    caption: str
    seeds: tuple[int, ...] = ()
    negative: str | None = None


@dataclass(frozen=True, kw_only=True)
class PromptedVideo:
    """What one video is sampled from.

    Attributes:
        caption: What it is to show.
        seed: Of its noise.
        negative: What guidance leads away from; None: the model's own negative prompt.
    """

    caption: str
    seed: int
    negative: str | None = None


@dataclass(frozen=True)
class Prompts:
    """All prompts of one purpose, in their order.

    Attributes:
        lines: One or more.
    """

    lines: tuple[Prompt, ...]

    @classmethod
    def of(cls, captions: Iterable[str]) -> Prompts:
        """Captions and no more."""
        return cls(tuple(Prompt(caption=caption) for caption in captions))

    @classmethod
    def parse(cls, value: Any, *, key: str) -> Prompts:
        """What a configuration holds: captions, objects, or the name of one file.

        Args:
            value: Plain: text, or a list of texts, numbers and dicts.
            key: Where it stands, for messages.

        Raises:
            UserError: There is no prompt, a file can't be read, or a line says what it can't say.
        """
        if (path := _file(value)) is not None:
            return read_prompts(path, key=key)
        entries = list(value) if isinstance(value, list | tuple) else [value]
        if not entries:
            raise UserError(f"{key}=[] is empty; write null, captions, or a file of them")
        return cls(tuple(_entry(entry, place=f"{key}[{index}]") for index, entry in enumerate(entries)))

    @property
    def captions(self) -> list[str]:
        """Their captions, in order."""
        return [line.caption for line in self.lines]

    @property
    def num_videos(self) -> int:
        """Videos before the first line comes again: one for a line, or for each of its seeds."""
        return sum(len(line.seeds) or 1 for line in self.lines)

    def texts(self) -> list[str]:
        """All that a text encoder has to read for them: captions and their own negative prompts, each once."""
        return list(
            dict.fromkeys([*self.captions, *(line.negative for line in self.lines if line.negative is not None)])
        )

    def plain(self) -> list[str | dict[str, Any]]:
        """What :meth:`parse` makes the same prompts of again, without a file."""
        return [_plain(line) for line in self.lines]

    def videos(self, seeds: Sequence[int]) -> list[PromptedVideo]:
        """One video for each line and seed; ``seeds`` count for the lines that name none."""
        return [
            PromptedVideo(caption=line.caption, seed=seed, negative=line.negative)
            for line in self.lines
            for seed in line.seeds or seeds
        ]

    def in_turn(self, count: int, *, first_seed: int) -> list[PromptedVideo]:
        """So many videos: the lines (a line once for each of its seeds) one after the other, again and again if need be.

        Video i has the seed ``first_seed + i``, or its line's own where that comes for the first time: a second time would be
        the same video.
        """
        once = [(line, seed) for line in self.lines for seed in line.seeds or (None,)]
        chosen = [once[index % len(once)] for index in range(count)]
        return [
            PromptedVideo(
                caption=line.caption,
                seed=first_seed + index if seed is None or index >= len(once) else seed,
                negative=line.negative,
            )
            for index, (line, seed) in enumerate(chosen)
        ]

    def __len__(self) -> int:
        """Number of lines."""
        return len(self.lines)


def read_prompts(path: Path, *, key: str) -> Prompts:
    """Read a file of prompts; see the module's head.

    Args:
        path: The file.
        key: Whose value its name is, for messages.

    Raises:
        UserError: It can't be read as text, holds no prompt, or a line says what it can't say; with file and line.
    """
    if path.suffix.lower() in _OTHER_FORMATS:
        raise UserError(
            f"{key}={path} can't be read as a text file of prompts: write one caption to a line, or a .jsonl file with lines "
            'like {"prompt": "a cat", "seed": 1}'
        )
    lines = [line.strip() for line in _text(path, key=key).replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    read_line = _json_line if path.suffix.lower() == ".jsonl" else _text_line
    found = tuple(read_line(line, place=f"{path}:{number}") for number, line in enumerate(lines, 1) if line)
    if not found:
        raise UserError(f"{key}={path} holds no caption; write one to a line")
    return Prompts(found)


def without_files(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A verb's plain configuration with the prompts themselves in the place of files that hold them.

    So a run's config.yaml says what it samples, wherever the files are moved and whatever is written into them later.

    Raises:
        UserError: See :meth:`Prompts.parse`.
    """
    found = dict(plain)
    if (path := _file(found.get("prompts"))) is not None:
        found["prompts"] = read_prompts(path, key="prompts").plain()
    for section in ("evaluation", "calibration"):
        values = found.get(section)
        if isinstance(values, Mapping) and (path := _file(values.get("prompts"))) is not None:
            found[section] = {**values, "prompts": read_prompts(path, key=f"{section}.prompts").plain()}
    return found


def _file(value: Any) -> Path | None:
    """The file that a configuration's value names; None where it is something else."""
    if isinstance(value, list | tuple) and len(value) == 1:
        (value,) = value
    return _expanded(value) if isinstance(value, str) and _names_a_file(value) else None


def _expanded(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user's home: reading it says that there is no such file
        return Path(text)


def _plain(line: Prompt) -> str | dict[str, Any]:
    if not line.seeds and line.negative is None and not _names_a_file(line.caption):
        return line.caption
    values = {"prompt": line.caption, "seed": list(line.seeds) or None, "negative_prompt": line.negative}
    return {name: value for name, value in values.items() if value is not None}


def _names_a_file(text: str) -> bool:
    """A path and not a caption: it is there, or ends as such a file does, or is a single word of ASCII letters.

    One word alone is rather a mistyped name than a caption; a file can hold it.
    """
    try:
        exists = _expanded(text).exists()
    except (OSError, ValueError):  # too long for a name, or a zero byte
        exists = False
    single = text.isascii() and len(text.split()) == 1
    return exists or single or text.lower().endswith((".txt", ".jsonl", *_OTHER_FORMATS))


def _text(path: Path, *, key: str) -> str:
    def refuse(why: str) -> UserError:
        return UserError(
            f"{key}={path} can't be read as a text file ({why}); write a file with one caption to a line, or a list of "
            "captions"
        )

    try:
        content = path.read_bytes()
    except OSError as error:
        raise refuse(error.strerror or str(error)) from error
    if (mark := content[:2]) in _BYTE_ORDER_MARKS:
        name = _BYTE_ORDER_MARKS[mark]
        raise refuse(f"it is {name}; convert it with `iconv -f {name} -t UTF-8 {path.name} > NEW.txt`")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise refuse(f"line {line} is no UTF-8: byte {content[error.start]:#04x}; save it as UTF-8") from error
    if "\0" in text:
        raise refuse(f"line {text[: text.index(chr(0))].count(chr(10)) + 1} holds a zero byte; save it as UTF-8 text")
    return text


def _text_line(line: str, *, place: str) -> Prompt:
    if line.startswith('{"') and line.endswith("}"):
        raise UserError(f"{place} looks like JSON; give the file a name that ends in .jsonl")
    return Prompt(caption=line)


def _json_line(line: str, *, place: str) -> Prompt:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{place} says {name!r} twice; leave one out")
        return dict(pairs)

    try:
        found = json.loads(line, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is no JSON ({error.msg} at character {error.pos + 1}): {_shown(line)}") from error
    except RecursionError as error:
        raise UserError(
            f"{place} is no JSON object with the keys {', '.join(KEYS)}: it is nested too deeply"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f'{place} is no object: {_shown(line)}; write lines like {{"prompt": "a cat"}}')
    return _from_object(found, place=place)


def _entry(entry: Any, *, place: str) -> Prompt:
    """An entry of a list."""
    if isinstance(entry, dict):
        return _from_object(entry, place=place)
    if isinstance(entry, int) and not isinstance(entry, bool):
        entry = str(entry)  # a caption may look like a number
    return Prompt(caption=_caption(entry, place=place))


def _from_object(found: dict[Any, Any], *, place: str) -> Prompt:
    for name in found:
        if name not in KEYS:
            raise UserError(
                f"{place}: unknown key {name!r}{did_you_mean(str(name), KEYS)} (there are: {', '.join(KEYS)})"
            )
    if "prompt" not in found:
        raise UserError(f'{place} has no "prompt"; write for example {{"prompt": "a cat"}}')
    negative = found.get("negative_prompt")
    if negative is not None and not isinstance(negative, str):
        raise UserError(f'{place}: negative_prompt={_shown(negative)} is no text; write "" for none')
    return Prompt(
        caption=_caption(found["prompt"], place=place), seeds=_seeds(found.get("seed"), place=place), negative=negative
    )


def _caption(value: Any, *, place: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: {_shown(value)} is no text; write a caption, in quotes")
    if not value.strip():
        raise UserError(f"{place} is an empty caption; write what the video is to show, or leave it out")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError(f"{place}: {value!a} holds half of a character; write it as UTF-8")
    return value


def _seeds(value: Any, *, place: str) -> tuple[int, ...]:
    if value is None:
        return ()
    seeds = value if isinstance(value, list) else [value]
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise UserError(f"{place}: seed={_shown(seed)} is no whole number in 0..{2**32 - 1}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"{place}: seed={_shown(seeds)} {'names one twice' if seeds else 'is empty'}; leave it out")
    return tuple(seeds)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
