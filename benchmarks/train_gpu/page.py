"""The page of all results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def page(head: Mapping[str, Any], results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Lines of Markdown."""
    lines = [
        "# Training steps on a GPU",
        "",
        f"{head['device']}, torch {head['torch']}, commit {head['commit']}. Random weights, one sample of full size, "
        f"bfloat16 autocast, W4A4; medians of {head['rounds']} steps after one (lowest to highest). Ratios are to the plain "
        "step, distillation without quantization. Planned memory is of `dry_run`, predicted seconds of `qvgen benchmark "
        "step_traffic`.",
        "",
        f"    {head['command']}",
    ]
    for name in ("steps", "blocks"):
        if results.get(name):
            lines += ["", *_steps(results[name])]
    if results.get("runs"):
        lines += ["", *_runs(results["runs"])]
    return lines


def _steps(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = [
        "model",
        "variant",
        "micro-batch s",
        "ratio",
        "predicted s",
        "optimizer s",
        "peak GiB",
        "planned GiB",
        "first s",
    ]
    plain = {row["model"]: row["micro_batch_s"][1] for row in rows if row["variant"] == "plain" and "error" not in row}
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [row["model"], row["variant"]]
        if "error" in row:
            cells += [row["error"].replace("|", "/"), *[""] * 6]
        else:
            low, middle, high = row["micro_batch_s"]
            ratio = middle / plain[row["model"]] if row["model"] in plain else None
            cells += [
                f"{middle:.3f} ({low:.3f} to {high:.3f})", _number(ratio, ".2f"), _number(row.get("predicted_s"), ".3f"),
                f"{row['optimizer_s']:.3f}", _gib(row["peak_bytes"]), _gib(row.get("planned_bytes")), f"{row['first_s']:.1f}",
            ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _runs(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "Whole runs of `tiny_wide` at W3A3, 500 steps:",
        "",
        "| method | held-out error of the start | trained | seconds |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['method']} | {row['error'].replace('|', '/')} | | {row['seconds']:.0f} |")
        else:
            lines.append(f"| {row['method']} | {row['start']:.4f} | {row['trained']:.4f} | {row['seconds']:.0f} |")
    return lines


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**30:.1f}"
