"""The tiny model's language: "a COLOR DIGIT MOTION", three tokens from a fixed table; the empty text is its null token.

It stands where a large model has a frozen text encoder. The table is random and never trained, and is made anew from its
seed wherever it is needed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

VOCABULARY: dict[str, tuple[str, ...]] = {
    "color": ("red", "green", "blue", "yellow", "magenta", "cyan"),
    "digit": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "motion": (
        "standing still",
        "moving up",
        "moving down",
        "moving left",
        "moving right",
        "moving up left",
        "moving up right",
        "moving down left",
        "moving down right",
    ),
}
"""The words of each slot. The table has a row for each of them, in this order, and the null row at the end."""

NUM_TOKENS = len(VOCABULARY)
NULL_ROW = sum(len(words) for words in VOCABULARY.values())

_PATTERN = re.compile(r"a (?P<color>\w+) (?P<digit>\w+) (?P<motion>\w.*)")
_SEED = 7


def token_rows(caption: str) -> list[int]:
    """Look up one caption.

    Args:
        caption: "a COLOR DIGIT MOTION", or empty.

    Returns:
        Rows of the table, one per slot.

    Raises:
        ValueError: for another form, or a word that the slot does not have.

    >>> token_rows("a green zero standing still"), token_rows("")
    ([1, 6, 16], [25, 25, 25])
    """
    if not caption:
        return [NULL_ROW] * NUM_TOKENS
    match = _PATTERN.fullmatch(caption)
    if match is None:
        raise ValueError(
            f"caption {caption!r} is no 'a COLOR DIGIT MOTION'; write one like 'a red three moving up left'"
        )
    rows, first = [], 0
    for slot, words in VOCABULARY.items():
        if match[slot] not in words:
            raise ValueError(f"caption {caption!r} has the unknown {slot} {match[slot]!r}; use {', '.join(words)}")
        rows.append(first + words.index(match[slot]))
        first += len(words)
    return rows


def token_ids(captions: Sequence[str]) -> Tensor:
    """Look up captions: int64 [B, 3]; see :func:`token_rows`."""
    rows = [token_rows(caption) for caption in captions]
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), NUM_TOKENS)


def embedding_table(size: int) -> Float[Tensor, "rows size"]:
    """Make the table: float32 [26, size], standard normal."""
    return torch.randn(NULL_ROW + 1, size, generator=torch.Generator().manual_seed(_SEED))
