"""One prompt, and the object that a line of a .jsonl file or an entry of a list says it with.

{"prompt": "a cat", "seed": [1, 2], "negative_prompt": "blurred", "image": "cat.png"}
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvgen.config.prompts.image_prompt import ImagePrompt
from qvgen.errors import UserError, did_you_mean

KEYS = ("prompt", "seed", "negative_prompt", "image")
"""Keys that a line of a .jsonl file may have."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One line.

    Attributes:
        caption: Text of what a video is to show, with its image if it has one (:mod:`qvgen.config.prompts.image_prompt`).
        seeds: One video for each; empty: the run's seeds count.
        negative: What guidance leads away from; None: the model's own negative prompt.
    """

    caption: str
    seeds: tuple[int, ...] = ()
    negative: str | None = None


def prompt_from_object(entry: dict[Any, Any], *, place: str, folder: Path = Path()) -> Prompt:
    """Read an object with the keys :data:`KEYS`.

    Args:
        entry: The object.
        place: Where it stands, for messages.
        folder: Folder that the image's path begins in.

    Raises:
        UserError: It lacks the caption, has another key, a value of another kind, or an image that is no file.
    """
    for name in entry:
        if name not in KEYS:
            raise UserError(
                f"{place}: unknown key {name!r}{did_you_mean(str(name), KEYS)} (there are: {', '.join(KEYS)})"
            )
    if "prompt" not in entry:
        raise UserError(f'{place} has no "prompt"; write for example {{"prompt": "a cat"}}')
    negative = entry.get("negative_prompt")
    if negative is not None and not isinstance(negative, str):
        raise UserError(f'{place}: negative_prompt={shortened(negative)} is no text; write "" for none')
    caption = checked_caption(entry["prompt"], place=place)
    if (image := entry.get("image")) is not None:
        caption = ImagePrompt(caption, checked_image(image, place=place, folder=folder))
    return Prompt(
        caption=caption,
        seeds=_seeds(entry.get("seed"), place=place),
        negative=negative,
    )


def checked_caption(value: Any, *, place: str) -> str:
    """A caption as it was given; raises UserError where it is no text or says nothing."""
    if not isinstance(value, str):
        raise UserError(f"{place}: {shortened(value)} is no text; write a caption, in quotes")
    if not value.strip():
        raise UserError(f"{place} is an empty caption; write what the video is to show, or leave it out")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError(f"{place}: {value!a} holds half of a character; write it as UTF-8")
    return value


def checked_image(value: Any, *, place: str, folder: Path = Path()) -> str:
    """The path of an image file; raises UserError where it is none."""
    if not isinstance(value, str) or not value:
        raise UserError(f"{place}: image={shortened(value)} is no path; write the name of an image file, in quotes")
    path = folder / Path(value).expanduser()
    if not path.is_file():
        raise UserError(f"{place}: image={value} is no file ({path}); write the path of an image")
    return str(path)


def _seeds(value: Any, *, place: str) -> tuple[int, ...]:
    if value is None:
        return ()
    seeds = value if isinstance(value, list) else [value]
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise UserError(f"{place}: seed={shortened(seed)} is no whole number in 0..{2**32 - 1}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"{place}: seed={shortened(seeds)} {'names one twice' if seeds else 'is empty'}; leave it out")
    return tuple(seeds)


def shortened(value: Any) -> str:
    """A value as a message shows it."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
