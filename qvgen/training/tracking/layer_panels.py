"""All layers of a model on a run's page at Weights & Biases: a table at each step, pictures over all steps at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qvgen.evaluation.layer_history import LAYER_COLUMNS, LAYER_FILE, layer_histories, read_layer_rows
from qvgen.evaluation.report.heat_map import draw_layers
from qvgen.training.tracking.sections import STEP

TABLE = "quant/layers"
_PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title><style>
:root {{ color-scheme: light dark; --text-soft: light-dark(#5b6472, #98a2b1); --line: light-dark(#e3e6ea, #2a303a); }}
body {{ margin: 0; font: 14px system-ui, sans-serif; }} svg {{ width: 100%; max-width: 60rem; }}
</style>{svg}"""
"""A drawing as a page of its own, with the colours that it takes from its page."""


def log_layer_table(run: Any, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
    """Log the numbers of all layers at an optimizer step, as a table that can be sorted and stepped through.

    Args:
        run: wandb's.
        rows: Column of :data:`LAYER_COLUMNS` -> value, without the step; what a layer lacks is missing.
        step: Optimizer step.
    """
    import wandb

    columns = [column for column in LAYER_COLUMNS[1:] if any(column in row for row in rows)]
    table = wandb.Table(columns=columns, data=[[row.get(column) for column in columns] for row in rows])
    run.log({TABLE: table, STEP: step}, step=step)


def log_layer_pictures(run: Any, run_dir: Path) -> None:
    """Log a picture of each number in a run's table of layers; nothing where there is no table."""
    import wandb

    drawn = draw_layers(layer_histories(read_layer_rows(run_dir / LAYER_FILE)[0]))
    pages = {name: _PAGE.format(title=chart.title, svg=chart.svg) for name, chart in drawn.items()}
    if pages:
        run.log({f"quant/{name}_by_layer": wandb.Html(page, inject=False) for name, page in pages.items()})
