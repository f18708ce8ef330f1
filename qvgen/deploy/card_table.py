"""A table of a model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def card_table(values: Mapping[str, Any]) -> str:
    """Rows of what is known.

    Example:
        >>> print(card_table({"seed": 0, "bits": None}))
        | | |
        |---|---|
        | seed | 0 |
    """
    rows = [f"| {key} | {_cell(value)} |" for key, value in values.items() if value not in (None, "", [])]
    return "\n".join(["| | |", "|---|---|", *rows])


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
