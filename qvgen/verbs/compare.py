"""Compare finished runs, or evaluations: one table and one page, with curves and videos, or with intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qvgen.config.command_line import command_line
from qvgen.config.schema.verbs import CompareConfig
from qvgen.errors import did_you_mean
from qvgen.evaluation.report.compare_page import render_comparison
from qvgen.evaluation.report.evaluation_comparison import (
    comparison_json,
    markdown_table,
    read_models,
    render_evaluations,
)
from qvgen.evaluation.report.published import TABLES, published_json, published_markdown
from qvgen.evaluation.report.run_comparison import build_table, table_json, table_lines
from qvgen.evaluation.report.run_record import common_parent, find_runs, read_runs
from qvgen.run_directory import atomic_write

PAGE_FILE, JSON_FILE, MARKDOWN_FILE = "compare.html", "compare.json", "compare.md"
EVALUATION_FILE = "evaluation.json"


def run(config: CompareConfig) -> None:
    """Find the runs or evaluations, print their table, write page and JSON."""
    evaluations = [path for path in config.runs if _holds_evaluation(path)]
    if evaluations:
        if len(evaluations) < len(config.runs):
            other = next(path for path in config.runs if path not in evaluations)
            raise ValueError(f"{evaluations[0]} holds an evaluation and {other} does not; compare runs or evaluations")
        _compare_evaluations(evaluations, config)
        return
    if config.published is not None:
        raise ValueError(f"published={config.published} stands beside evaluations, and these are runs; leave it out")
    paths = find_runs(config.runs)
    out = config.out or common_parent(paths)
    if config.dry_run:
        print(f"{len(paths)} runs into {out / PAGE_FILE}: {', '.join(map(str, paths))}")
        return
    _compare(paths, out)


def _holds_evaluation(path: Path) -> bool:
    return (path / EVALUATION_FILE).is_file()


def _compare_evaluations(folders: Sequence[Path], config: CompareConfig) -> None:
    published, out = config.published, config.out or common_parent(folders)
    if published is not None and published not in TABLES:
        raise ValueError(
            f"unknown published={published}{did_you_mean(published, TABLES)} (there are: {', '.join(TABLES)})"
        )
    models = read_models(folders)
    if config.dry_run:
        print(f"{len(folders)} evaluations into {out / PAGE_FILE}: {', '.join(map(str, folders))}")
        return
    table = markdown_table(models)
    out.mkdir(parents=True, exist_ok=True)
    changes = {"out": out, **({} if published is None else {"published": published})}
    command = command_line("compare", map(str, folders), changes=changes)
    content = comparison_json(models)
    if published is not None:
        table += f"\n{published_markdown(published)}"
        content["published"] = published_json(published)
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    atomic_write(out / JSON_FILE, text.encode())
    atomic_write(out / MARKDOWN_FILE, table.encode())
    atomic_write(
        out / PAGE_FILE, render_evaluations(models, table=table, command=command, published=published).encode()
    )
    print(table, end="")
    print(f"comparison: {out / PAGE_FILE}")


def after_sweep(verb: str, plains: Sequence[Mapping[str, Any]]) -> None:
    """After a sweep's jobs: its runs, also those that failed or were not begun, with the page beside them.

    Args:
        verb: Whose jobs they were; those of other verbs than train and ptq are no runs.
        plains: The jobs' configurations.
    """
    if verb in ("train", "ptq") and not any(plain["dry_run"] for plain in plains):
        paths = [Path(plain["run_dir"]) for plain in plains]
        _compare(paths, common_parent(paths))


def _compare(paths: Sequence[Path], out: Path) -> None:
    table = build_table(read_runs(paths))
    for line in table_lines(table):
        print(line)
    out.mkdir(parents=True, exist_ok=True)
    command = command_line("compare", map(str, paths), changes={"out": out})
    text = json.dumps(table_json(table), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    atomic_write(out / JSON_FILE, text.encode())
    atomic_write(out / PAGE_FILE, render_comparison(table, command=command).encode())
    print(f"comparison: {out / PAGE_FILE}")
