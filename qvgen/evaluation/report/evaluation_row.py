"""An evaluation's row of a paper's table: as Markdown, LaTeX and CSV, each value with its interval."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from qvgen.evaluation.report.page_format import format_number
from qvgen.evaluation.report.vbench_scores import score_rows

ARROWS = {"higher": "\N{UPWARDS ARROW}", "lower": "\N{DOWNWARDS ARROW}", "neither": ""}
_TEX_ARROWS = {"higher": r" $\uparrow$", "lower": r" $\downarrow$", "neither": ""}
_TEX_SIGNS = {sign: rf"\{sign}" for sign in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


def heading(entry: Mapping[str, Any]) -> str:
    """Title, unit and the direction in which the metric is better."""
    unit = f" ({entry['unit']})" if entry["unit"] else ""
    return f"{entry['title']}{unit} {ARROWS[entry['better']]}".rstrip()


def with_interval(found: Mapping[str, Any]) -> str:
    """A value and its interval.

    >>> with_interval({"value": 21.345, "low": 20.1, "high": 22.9}), with_interval({"value": 0.5, "low": None, "high": None})
    ('21.3 [20.1, 22.9]', '0.500')
    """
    text = format_number(found["value"])
    return text if found["low"] is None else f"{text} [{format_number(found['low'])}, {format_number(found['high'])}]"


def markdown_row(content: Mapping[str, Any]) -> str:
    """The table as Markdown: the model, and the reference where a metric is measured of it too."""
    metrics, scores = content["metrics"], score_rows(content)
    heads = ["model", *(heading(entry) for entry in metrics.values()), *(row.heading for row in scores)]
    cells = [*(with_interval(entry) for entry in metrics.values()), *(row.text for row in scores)]
    rows = [[content["model"]["label"], *cells]]
    if any("reference" in entry for entry in metrics.values()):
        theirs = (with_interval(entry["reference"]) if "reference" in entry else "" for entry in metrics.values())
        rows.append([content["reference"]["label"], *theirs, *(row.reference_text for row in scores)])
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def latex_row(content: Mapping[str, Any]) -> str:
    """The table as LaTeX: the model alone, both ends of each interval written out."""
    metrics, scores = content["metrics"], score_rows(content)
    heads = [_tex(heading(entry).rstrip("".join(ARROWS.values())).strip()) for entry in metrics.values()]
    heads = [head + _TEX_ARROWS[entry["better"]] for head, entry in zip(heads, metrics.values(), strict=True)]
    heads += [f"VBench {row.name}{_TEX_ARROWS['higher']}" for row in scores]
    cells = [_tex(content["model"]["label"]), *(_tex(with_interval(entry)) for entry in metrics.values())]
    cells += [row.text for row in scores]
    return (
        f"\\begin{{tabular}}{{l{'r' * len(heads)}}}\n"
        f"model & {' & '.join(heads)} \\\\\n\\hline\n{' & '.join(cells)} \\\\\n\\end{{tabular}}\n"
    )


def csv_rows(content: Mapping[str, Any]) -> str:
    """One line for each metric, every digit."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["model", "metric", "unit", "better", "videos", "value", "low", "high", "reference", "difference", "p"]
    )
    for name, entry in content["metrics"].items():
        theirs, change = entry.get("reference", {}), entry.get("difference", {})
        writer.writerow(
            [
                content["model"]["label"], name, entry["unit"], entry["better"], entry["num_videos"],
                entry["value"], entry["low"], entry["high"], theirs.get("value"), change.get("value"), change.get("p"),
            ]
        )  # fmt: skip
    for row in score_rows(content):
        name = f"vbench_{row.name}"
        writer.writerow(
            [content["model"]["label"], name, "", "higher", "", row.value, None, None, row.reference, None, None]
        )
    return buffer.getvalue()


def _tex(text: str) -> str:
    return "".join(_TEX_SIGNS.get(sign, sign) for sign in text)
