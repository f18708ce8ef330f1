"""Several evaluations in one table: a row for each model, a column for each metric, each value with its interval.

The first one is what the others are held against: on the videos that two evaluations have in common, of one prompt and one
noise, by the paired test of :mod:`qvgen.evaluation.suite.statistics`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qvgen.errors import UserError
from qvgen.evaluation.report.canvas import FIRST, SECOND, Canvas, Chart
from qvgen.evaluation.report.evaluation_row import heading, with_interval
from qvgen.evaluation.report.page import render_page
from qvgen.evaluation.report.published import TABLES
from qvgen.evaluation.suite.summary import against, read_evaluation

NO_NUMBER = "\N{EN DASH}"


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A row.

    Attributes:
        name: The model's label, with its folder where labels are alike.
        folder: The evaluation's folder.
        content: What its evaluation.json holds.
        nbytes: Bytes of the packed weights; None: files were evaluated.
        changes: Metric -> how it differs from the first model's; empty for the first.
    """

    name: str
    folder: Path
    content: Mapping[str, Any]
    nbytes: int | None
    changes: Mapping[str, Mapping[str, Any]]

    def cell(self, metric: str) -> str:
        """A metric's value with its interval, and what is known of its difference from the first model's."""
        entry = self.content["metrics"].get(metric)
        if entry is None:
            return NO_NUMBER
        change = self.changes.get(metric)
        if change is None or change["p"] is None:
            return with_interval(entry)
        return f"{with_interval(entry)}{'' if change['is_settled'] else ' ='} (p {change['p']:.2g})"


def read_models(folders: Sequence[Path]) -> list[EvaluatedModel]:
    """Read evaluations and hold each against the first.

    Raises:
        UserError: A folder holds no evaluation, there is one alone, or two have no video in common.
    """
    if len(folders) < 2:
        raise UserError(f"qvgen compare {folders[0]}: one evaluation has nothing beside it; name two or more")
    contents = [read_evaluation(folder, key="runs") for folder in folders]
    labels = [str(content["model"]["label"]) for content in contents]
    models = []
    for folder, content, label in zip(folders, contents, labels, strict=True):
        try:
            changes = against(content, contents[0]) if models else {}
        except UserError as error:
            raise UserError(f"{folders[0]} and {folder}: {error}") from error
        name = label if labels.count(label) == 1 else f"{label} ({folder})"
        models.append(
            EvaluatedModel(
                name=name, folder=folder, content=content, nbytes=content["model"].get("bytes"), changes=changes
            )
        )
    return models


def metrics_of(models: Sequence[EvaluatedModel]) -> dict[str, Mapping[str, Any]]:
    """Every metric that any of them has -> its entry, in the order of the first that has it."""
    found: dict[str, Mapping[str, Any]] = {}
    for model in models:
        for name, entry in model.content["metrics"].items():
            found.setdefault(name, entry)
    return found


def markdown_table(models: Sequence[EvaluatedModel]) -> str:
    """The table as Markdown."""
    metrics = metrics_of(models)
    has_bytes = any(model.nbytes is not None for model in models)
    heads = ["model", *(["bytes"] if has_bytes else []), *(heading(entry) for entry in metrics.values())]
    rows = []
    for model in models:
        size = NO_NUMBER if model.nbytes is None else f"{model.nbytes}"
        rows.append([model.name, *([size] if has_bytes else []), *(model.cell(name) for name in metrics)])
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def comparison_json(models: Sequence[EvaluatedModel]) -> dict[str, Any]:
    """The content of compare.json."""
    return {
        "models": [
            {
                "name": model.name,
                "folder": str(model.folder),
                "bytes": model.nbytes,
                "metrics": {
                    name: {key: entry[key] for key in ("value", "low", "high", "num_videos")}
                    for name, entry in model.content["metrics"].items()
                },
                "against_first": dict(model.changes),
            }
            for model in models
        ],
        "front": [model.name for model in pareto_front(models)],
    }


def front_metric(models: Sequence[EvaluatedModel]) -> str | None:
    """The metric that bytes are held against: the first with a direction that all models have; None without one."""
    for name, entry in metrics_of(models).items():
        if entry["better"] != "neither" and all(name in model.content["metrics"] for model in models):
            return name
    return None


def _points(models: Sequence[EvaluatedModel], metric: str) -> list[tuple[int, float, EvaluatedModel]]:
    """Bytes and value of each model whose bytes are known."""
    return [
        (model.nbytes, float(model.content["metrics"][metric]["value"]), model)
        for model in models
        if model.nbytes is not None
    ]


def pareto_front(models: Sequence[EvaluatedModel]) -> list[EvaluatedModel]:
    """The models that no other one beats in bytes and in :func:`front_metric` at once, from the smallest on."""
    if (name := front_metric(models)) is None:
        return []
    sign = 1.0 if metrics_of(models)[name]["better"] == "higher" else -1.0
    points = [(size, sign * value, model) for size, value, model in _points(models, name)]

    def is_beaten(size: int, score: float) -> bool:
        return any(s <= size and other >= score and (s, other) != (size, score) for s, other, _ in points)

    front = [(size, model) for size, score, model in points if not is_beaten(size, score)]
    return [model for _, model in sorted(front, key=lambda entry: entry[0])]


def draw_front(models: Sequence[EvaluatedModel]) -> Chart | None:
    """Bytes against a metric, a point for each model with its interval; the front is a line. None without bytes of two."""
    name = front_metric(models)
    points = [] if name is None else _points(models, name)
    if name is None or len(points) < 2:
        return None
    sizes = np.array([size for size, _, _ in points]) / 1e6
    with Canvas(f"{heading(metrics_of(models)[name])} against MB of weights", last_step=1) as canvas:
        axes = canvas.axes
        for size, (_, value, model) in zip(sizes, points, strict=True):
            entry = model.content["metrics"][name]
            if entry["low"] is not None:
                axes.plot([size, size], [entry["low"], entry["high"]], color=FIRST, linewidth=1.0)
            axes.plot([size], [value], color=FIRST, marker="o", markersize=5)
            axes.annotate(model.name, (size, value), fontsize=7, xytext=(4, 4), textcoords="offset points")
        front = [(size / 1e6, value) for size, value, _ in _points(pareto_front(models), name)]
        axes.plot(*zip(*front, strict=True), color=SECOND, linewidth=1.2, drawstyle="steps-post")
        room = 0.1 * max(float(np.ptp(sizes)), 0.1 * float(sizes.max()))
        axes.set_xlim(sizes.min() - room, sizes.max() + 2 * room)
        axes.set_xlabel("MB of packed weights")
        return canvas.chart("The line joins the models that no other one beats in both.")


def render_evaluations(
    models: Sequence[EvaluatedModel], *, table: str, command: str, published: str | None = None
) -> str:
    """Return the page as text.

    Args:
        models: The rows.
        table: The table as Markdown, for a paper.
        command: The command that makes the page again.
        published: Name of a paper's table that is shown too.
    """
    metrics = metrics_of(models)
    return render_page(
        "evaluations.html.j2",
        models=models,
        heads=[(name, heading(entry), entry["source"]) for name, entry in metrics.items()],
        front=draw_front(models),
        table=table,
        published=None if published is None else TABLES[published],
        command=command,
    )
