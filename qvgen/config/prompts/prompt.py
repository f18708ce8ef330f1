"""Prompts as a user gives them: captions, with seeds and negative prompts where a file says so.

    ["a cat", "a dog"]         captions
    FILE.txt                   one caption to a line; any name but *.jsonl; blank lines are left out
    FILE.jsonl                 one object to a line: {"prompt": "a cat", "seed": [1, 2], "negative_prompt": "blurred"}
    [{prompt: a cat, seed: 1}] the same objects, in a YAML file

An object's ``image`` is the path of an image file that an image-to-video model begins the video with; it starts from the
prompt file's folder, in a list from the working one.

``seed`` is a number or a list of them, one video for each; without it the run's seeds count. ``negative_prompt`` stands in
place of the model's; ``""`` is none. Files are UTF-8, with or without a byte order mark; lines end in LF, CRLF or CR.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qvgen.config.prompts.file import named_file, names_a_file, read_prompt_file
from qvgen.config.prompts.image_prompt import image_of
from qvgen.config.prompts.line import Prompt, checked_caption, prompt_from_object
from qvgen.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PromptedVideo:
    """Caption, seed and negative prompt of one video.

    Attributes:
        caption: Text of what the video is to show, with its image if it has one.
        seed: Seed of the video's noise.
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
        """The prompts of a configuration: captions, objects, or the name of one file.

        Args:
            value: Plain: text, or a list of texts, numbers and dicts.
            key: Where it stands, for messages.

        Raises:
            UserError: There is no prompt, a file can't be read, or a line says what it can't say.
        """
        if (path := named_file(value)) is not None:
            return cls(read_prompt_file(path, key=key))
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
        """Plain values of which :meth:`parse` makes the same prompts again, without a file."""
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


def without_files(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A verb's plain configuration with the prompts themselves in the place of files that hold them.

    So a run's config.yaml says what it samples, wherever the files are moved and whatever is written into them later.

    Raises:
        UserError: See :meth:`Prompts.parse`.
    """
    resolved = dict(plain)
    if (path := named_file(resolved.get("prompts"))) is not None:
        resolved["prompts"] = Prompts(read_prompt_file(path, key="prompts")).plain()
    for section in ("evaluation", "calibration"):
        values = resolved.get(section)
        if isinstance(values, Mapping) and (path := named_file(values.get("prompts"))) is not None:
            resolved[section] = {**values, "prompts": Prompts(read_prompt_file(path, key=f"{section}.prompts")).plain()}
    return resolved


def _plain(line: Prompt) -> str | dict[str, Any]:
    image = image_of(line.caption)
    if not line.seeds and line.negative is None and image is None and not names_a_file(line.caption):
        return line.caption
    values = {"prompt": str(line.caption), "seed": list(line.seeds) or None, "negative_prompt": line.negative}
    values |= {"image": image}
    return {name: value for name, value in values.items() if value is not None}


def _entry(entry: Any, *, place: str) -> Prompt:
    """An entry of a list."""
    if isinstance(entry, dict):
        return prompt_from_object(entry, place=place)
    if isinstance(entry, int) and not isinstance(entry, bool):
        entry = str(entry)  # a caption may look like a number
    return Prompt(caption=checked_caption(entry, place=place))
