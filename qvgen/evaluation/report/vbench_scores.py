"""VBench's three scores of an evaluation as cells of a table: title, the model's, the reference's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qvgen.evaluation.report.page_format import format_number

SCORES = ("quality", "semantic", "total")


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """One score.

    Attributes:
        name: quality, semantic or total.
        heading: As a table's heading has it.
        value: The model's, a share of 1.
        reference: The reference's; None: it was not measured.
    """

    name: str
    heading: str
    value: float
    reference: float | None

    @property
    def text(self) -> str:
        """The model's as a table has it."""
        return format_number(self.value)

    @property
    def reference_text(self) -> str:
        """The reference's as a table has it; empty where there is none."""
        return "" if self.reference is None else format_number(self.reference)


def score_rows(content: Mapping[str, Any]) -> list[ScoreRow]:
    """The scores that an evaluation has; empty where dimensions are missing, or nobody gave the list of prompts."""
    found = content.get("vbench") or {}
    theirs, part = found.get("reference") or {}, found.get("subset")
    of = "" if part is None else f", {part['prompts']} of {part['of']} prompts"
    return [
        ScoreRow(
            name=name, heading=f"VBench {name}{of} \N{UPWARDS ARROW}", value=found[name], reference=theirs.get(name)
        )
        for name in SCORES
        if found.get(name) is not None
    ]


def missing_line(content: Mapping[str, Any]) -> str | None:
    """Why there is no total, in one sentence; None: there is one, or nobody gave the list of prompts."""
    found = content.get("vbench")
    if found is None or found["total"] is not None:
        return None
    return f"VBench has no total without all 16 dimensions; missing: {', '.join(found['missing'])}"
