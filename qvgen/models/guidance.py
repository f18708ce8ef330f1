"""Classifier-free guidance: which texts stand against the captions, and which texts have to be encoded for it.

    velocity = without + guidance_scale (with_caption - without)

``without`` is of the negative prompt: a model's own (``model.negative_prompt``), or one that a line of a prompt file names.
Training drops captions by the empty one, whatever the negative prompt is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qvgen.config.prompts.prompt import Prompts
from qvgen.config.schema.value_range import Range


def check_negative_prompt(value: Any) -> None:
    """Raise ValueError for a ``model.negative_prompt`` that is no text."""
    if not isinstance(value, str):
        raise ValueError(f'model.negative_prompt={value} is no text; write "" for none')


NUM_STEPS, GUIDANCE, SHIFT = Range(">= 1"), Range(">= 0"), Range(">= 1")
"""Ranges of ``num_inference_steps``, ``guidance_scale`` and ``shift`` in every family; the first is a whole number."""


def require_number(key: str, value: Any, limits: Range, *, whole: bool = False) -> None:
    """Raise ValueError for a ``model.KEY`` of sampling that is no finite number within its range ``>= ...``."""
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or value not in limits:
        kind = "whole" if whole else "finite"
        raise ValueError(f"model.{key}={value} is no {kind} number of at least {limits.text.removeprefix('>= ')}")


def negative_texts(own: str, given: Sequence[str | None] | None, *, count: int) -> list[str]:
    """The negative prompt of each of ``count`` videos.

    Args:
        own: The model's.
        given: One for each video, None where the model's counts; None: the model's for all.
        count: Videos.

    Raises:
        ValueError: Another number of negative prompts than of videos.
    """
    if given is None:
        return [own] * count
    if len(given) != count:
        raise ValueError(f"{count} captions and {len(given)} negative prompts; give one for each caption")
    return [own if negative is None else negative for negative in given]


def texts_to_encode(family: Any, prompts: Prompts) -> list[str]:
    """The texts that sampling with these prompts needs encoded: captions and, with guidance, negative prompts; each once."""
    if family.guidance_scale == 1:
        return list(dict.fromkeys(prompts.captions))
    return list(dict.fromkeys([*prompts.texts(), family.negative_prompt]))
