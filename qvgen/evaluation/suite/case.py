"""One video of an evaluation: which prompt, which noise, and its name in folders and files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from qvgen.config.prompts.image_prompt import image_of
from qvgen.config.prompts.prompt import PromptedVideo, Prompts
from qvgen.errors import UserError
from qvgen.evaluation.comparison import prompt_name


@dataclass(frozen=True, kw_only=True)
class Case:
    """One video.

    Attributes:
        name: Unique; the name of its files without their ending.
        prompt: Number of its prompt: the unit that intervals are drawn from.
        seed: Seed of its noise; None where nobody said it.
        caption: Text that it was made from; None where nobody said it.
        asked: How it is sampled; None for a video that is only read.
    """

    name: str
    prompt: int
    seed: int | None
    caption: str | None
    asked: PromptedVideo | None = None


def noise_seed(caption: str, index: int) -> int:
    """Seed of a prompt's video of this index: the same for every model, and whatever other prompts there are.

    >>> noise_seed("a red boat", 0), noise_seed("a red boat", 1)
    (3344084531, 1274208373)
    """
    return int.from_bytes(hashlib.sha256(f"{index} {caption}".encode()).digest()[:4], "big")


def sampled_cases(prompts: Prompts, *, seeds: int, negative: str) -> list[Case]:
    """The videos to sample: each prompt with its own seeds, else with ``seeds`` of :func:`noise_seed`.

    Args:
        prompts: The prompts.
        seeds: Videos of each prompt that names no seeds.
        negative: Negative prompt of those that name none.

    Raises:
        UserError: A prompt comes twice with one seed: that would be the same video again.
    """
    cases, seen = [], set()
    for number, line in enumerate(prompts.lines):
        for seed in line.seeds or [noise_seed(line.caption, index) for index in range(seeds)]:
            asked = PromptedVideo(
                caption=line.caption, seed=seed, negative=negative if line.negative is None else line.negative
            )
            key = (asked, image_of(line.caption))
            if key in seen:
                raise UserError(f"prompts holds {line.caption!r} twice with the seed {seed}; leave one out")
            seen.add(key)
            name = f"{prompt_name(number, line.caption)}-seed{seed}"
            cases.append(Case(name=name, prompt=number, seed=seed, caption=line.caption, asked=asked))
    return cases


def spread(cases: Sequence[Case]) -> list[Case]:
    """All cases in another order: the first of each prompt, then the second of each, so that the first ones are of many."""
    places, seen = [], dict.fromkeys((case.prompt for case in cases), 0)
    for case in cases:
        places.append(seen[case.prompt])
        seen[case.prompt] += 1
    return [case for _, case in sorted(zip(places, cases, strict=True), key=lambda pair: pair[0])]


def shown_names(names: Sequence[str], *, most: int = 3) -> str:
    """Some names for a message, and how many more there are."""
    more = len(names) - most
    return f"{', '.join(names[:most])}{f' and {more} more' if more > 0 else ''}"
