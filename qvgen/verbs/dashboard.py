"""Write the workspace of a project at Weights & Biases, so that its runs show their panels in the same order."""

from __future__ import annotations

import os

from qvgen.config.schema.presentation import DashboardConfig
from qvgen.errors import UserError, one_line
from qvgen.training.tracking.service import wandb_problem
from qvgen.training.tracking.workspace import PANELS, workspace


def run(config: DashboardConfig) -> None:
    """Save the workspace and print its address; with ``dry_run`` print what it would hold.

    Raises:
        UserError: There is no key, the server does not take it, the package wandb-workspaces is not there, or the server
            refuses the workspace.
    """
    if config.dry_run:
        for line in summary():
            print(line)
        return
    if not os.environ.get("WANDB_API_KEY"):
        raise UserError(
            "a workspace is written to Weights & Biases, which needs a key; set WANDB_API_KEY, or look at the panels with "
            "dry_run=true"
        )
    made = workspace(entity=config.entity or "", project=config.project, name=config.name)
    if (problem := wandb_problem()) is not None:
        raise UserError(f"wandb: {problem}; a workspace can be written by a server alone")
    try:
        if config.entity is None:
            import wandb

            made.entity = wandb.Api().default_entity
        made.save()
    except Exception as error:  # the border to a service, whose library raises errors of many kinds
        raise UserError(f"project={config.project}: the workspace was not saved ({one_line(error)})") from error
    print(made.url)


def summary() -> list[str]:
    """Sections and panels in words, a line each."""
    lines = []
    for section, panels in PANELS.items():
        lines += [section, *(f"  {panel.title}: {', '.join(panel.names)}" for panel in panels)]
    return lines
