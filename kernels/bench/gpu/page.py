"""The report of a run: everything that its JSON files say, measured beside predicted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_model import Card, attention_ms, bf16_ms, card_of, packed_ms, quantize_ms

from gpu.attention_times import FLASH
from gpu.models import Layer
from gpu.products import BF16

Row = dict[str, Any]

TARGETS = {"qkv": 1.25, "ff1": 1.3, "ff2": 1.1}
"""Times bfloat16 that a layer has to reach on an H200, its input's quantization included."""


@dataclass
class Results:
    """A run's files.

    Attributes:
        head: Card and versions.
        rows: Name of each part -> its rows.
    """

    head: Row
    rows: dict[str, list[Row]]

    def wrong(self) -> list[Row]:
        """Rows that say that something differs, moves or failed."""
        every = [row for rows in self.rows.values() for row in rows]
        return [
            row for row in every if any(row.get(key) is False for key in ("equal", "steady", "bits_equal", "finite"))
        ] + [
            row
            for name in ("correctness", "attention", "attention_gradient")
            for row in self.rows.get(name, [])
            if "error" in row
        ]


def read_results(out: Path) -> Results:
    """Read all that a run wrote so far."""
    results = Results({}, {})
    for path in sorted(out.glob("*.json")):
        if path.name.startswith(("warm-", "run.")) or "part" not in (found := json.loads(path.read_text("utf-8"))):
            continue
        results.rows.setdefault(found["part"], []).extend(found["rows"])
        results.head = {key: found[key] for key in ("card", "torch", "cuda", "triton")}
    return results


def write_page(path: Path, results: Results, states: dict[str, str]) -> None:
    """Write the report."""
    head, card = results.head, card_of(results.head.get("card", ""))
    lines = [
        f"# Kernels on {head.get('card', 'no card')}",
        "",
        f"torch {head.get('torch')}, CUDA {head.get('cuda')}, Triton {head.get('triton')}; made by "
        "`bash kernels/bench/gpu.sh OUT`. Milliseconds are medians of interleaved rounds, with the input's quantization "
        "where the candidate quantizes. *Predicted* is what no kernel can be faster than, by [the model](gpu-model.md).",
        "",
        "| part | state | cases that differ or failed |",
        "|---|---|---|",
    ]
    wrong = results.wrong()
    for name, state in states.items():
        count = sum(any(row is other for other in wrong) for row in results.rows.get(name, []))
        lines.append(f"| {name} | {state} | {count} of {len(results.rows.get(name, []))} |")
    sections = (
        ("Wrong", _wrong(wrong)),
        ("Linears", _linears(results.rows.get("table", []), card)),
        ("Blocks", _blocks(results.rows.get("blocks", []))),
        ("Attention", _attention(results.rows.get("attention_times", []), card)),
        ("Tiles", _tiles(results.rows.get("tiles", []))),
        ("Fake quantization", _fake_quantization(results.rows.get("fake_quantization", []))),
        ("compute-sanitizer", _sanitizer(results.rows.get("sanitizer", []))),
        ("Did not run", _errors(results)),
    )
    for title, body in sections:
        if table := list(body):
            lines += ["", f"## {title}", "", *table]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def _wrong(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        text = " ".join(f"{key}={value}" for key, value in row.items() if key != "case")
        lines.append((str(row["case"]), text[:300].replace("|", "/")))
    return _table(("case", "what"), lines)


def predicted_ms(row: Row, card: Card | None) -> float | None:
    """What the model says of a row of the table; None where it has no such card or candidate."""
    if card is None:
        return None
    layer = Layer(name=row["layer"], rows=row["rows"], columns=row["columns"], outputs=row["outputs"])
    if row["candidate"] == BF16:
        return bf16_ms(layer, card)
    if row["candidate"].endswith("quantize alone"):
        return quantize_ms(layer, card)
    kernel, _, label = row["candidate"].rpartition(" w")
    if not kernel or not label[:1].isdigit():
        return None
    return packed_ms(layer, int(label[0]), card, four=kernel == "cuda_int4")


def _linears(rows: Sequence[Row], card: Card | None) -> list[str]:
    baselines = {row["case"]: row["ms"] for row in rows if row.get("candidate") == BF16 and "ms" in row}
    lines = []
    for row in rows:
        if "ms" not in row:
            continue
        expected, base = predicted_ms(row, card), baselines.get(row["case"])
        packed = row.get("bytes_per_weight", 0.0) > 0
        times = None if base is None else base / row["ms"]
        target = TARGETS.get(row["layer"]) if packed and card is not None and card.name == "H200" else None
        verdict = "" if target is None or times is None else f"{target} {'reached' if times >= target else 'missed'}"
        lines.append(
            (
                row["model"], row["layer"], f"{row['rows']} x {row['columns']} -> {row['outputs']}", row["candidate"],
                f"{row['ms']:.3f} ({row['low_ms']:.3f} to {row['high_ms']:.3f})",
                "" if expected is None else f"{expected:.3f}",
                "" if times is None else f"{times:.2f}",
                f"{row['tops']:.0f}",
                f"{row['bytes_per_weight']:.3f}" if packed else "",
                verdict,
            )
        )  # fmt: skip
    columns = (
        "model", "layer", "M x K -> N", "candidate", "ms (lowest to highest)", "predicted", "times bf16",
        "10^12 operations/s", "bytes a weight", "target",
    )  # fmt: skip
    return _table(columns, lines)


def _blocks(rows: Sequence[Row]) -> list[str]:
    base = {(row["model"], row["part"]): row["ms"] for row in rows if row.get("way") == "bf16" and "ms" in row}
    lines = []
    for row in rows:
        if "ms" in row:
            first = base.get((row["model"], row["part"]))
            memory = [f"{row[key]:.0f}" if key in row else "" for key in ("weights_mib", "peak_mib")]
            times = "" if first is None else f"{first / row['ms']:.2f}"
            lines.append((row["model"], row["way"], row["part"], f"{row['ms']:.3f}", times, *memory))
    columns = ("model", "way", "part", "ms", "times bf16", "weights MiB", "peak beside them MiB")
    return _table(columns, lines)


def _attention(rows: Sequence[Row], card: Card | None) -> list[str]:
    base = {row["case"]: row["ms"] for row in rows if row.get("candidate") == FLASH and "ms" in row}
    lines = []
    for row in rows:
        if "ms" not in row:
            continue
        expected = None
        if card is not None and row["candidate"] in (FLASH, "triton int8"):
            dense, *bounds = attention_ms(
                card, heads=row["heads"], scores=row["tokens"] ** 2, head_size=row["head_size"]
            )
            expected = dense if row["candidate"] == FLASH else max(bounds)
        first = base.get(row["case"])
        lines.append(
            (
                f"{row['tokens']} tokens, {row['heads']} x {row['head_size']}", row["candidate"],
                f"{row['ms']:.3f} ({row['low_ms']:.3f} to {row['high_ms']:.3f})",
                "" if expected is None else f"{expected:.3f}",
                "" if first is None else f"{first / row['ms']:.2f}",
                f"{row['tops']:.0f}" if "tops" in row else "",
            )
        )  # fmt: skip
    columns = (
        "attention", "candidate", "ms (lowest to highest)", "predicted", "times flash", "10^12 operations/s"
    )  # fmt: skip
    return _table(columns, lines)


def _tiles(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        known = [ms for ms in row.get("times", {}).values() if ms is not None]
        if known and (entry := row["entry"]):
            best = min(row["times"], key=lambda name: row["times"][name] or float("inf"))
            numbers = (f"{entry['ms']:.3f}", f"{max(known):.3f}", f"{entry['bf16_ms']:.3f}")
            lines.append((row["case"], best, *numbers, f"{len(known)} of {len(row['times'])}"))
    return _table(("layer", "fastest tile", "ms", "slowest", "bf16 ms", "tiles that run"), lines)


def _fake_quantization(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        if "ms" in row:
            shape = f"{row['rows']} x {row['columns']} -> {row['outputs']}"
            bits_equal = {True: "equal", False: "NOT equal", None: ""}[row.get("bits_equal")]
            cells = (row["model"], row["layer"], shape, row["bits"], row["candidate"], f"{row['ms']:.2f}")
            lines.append((*cells, bits_equal, row.get("not there", "")))
    columns = ("model", "layer", "M x K -> N", "bits", "candidate", "ms of both passes", "bits", "not there")
    return _table(columns, lines)


def _sanitizer(rows: Sequence[Row]) -> list[str]:
    def says(row: Row) -> str:
        return row.get("not there") or row.get("error") or f"{row['found']} found"

    return _table(("tool", "result"), [(row["case"], says(row)) for row in rows])


def _errors(results: Results) -> Iterator[str]:
    found = [
        (name, f"{row['case']} {row.get('candidate', '')}".strip(), str(row["error"]).replace("|", "/"))
        for name, rows in results.rows.items()
        for row in rows
        if "error" in row
    ]
    yield from _table(("part", "case", "error"), found)
