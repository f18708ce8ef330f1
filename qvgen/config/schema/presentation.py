"""The frozen dataclasses of the verbs that present what was made to others: report-card, dashboard.

Meanings and ranges have their one home here, as in :mod:`qvgen.config.schema.sections`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from qvgen.config.schema.sections import require
from qvgen.config.schema.value_range import Range, check_ranges


@dataclass(frozen=True, kw_only=True)
class ReportCardConfig:
    """Everything that `qvgen report-card` needs.

    Attributes:
        packed: A packed directory.
        run_dir: A run's folder, in place of its packed directory.
        report: The run's report.json, whose recipe and measurements the page shows; None: the one beside the packed
            directory, if there is one.
        evaluation: Folder of `qvgen evaluate`, or its evaluation.json, whose intervals the page shows; None: it shows none.
        repo: ORG/NAME that the model has on the hub, for the lines that load it; None: a placeholder stands there.
        seconds: About how long the layers' times on this machine may take; 0 for none.
        out: The page; None: README.md in the packed directory.
        overwrite: True replaces a page that is there already; False refuses to.
        dry_run: True checks everything and says what would be written.
        debug: True shows the traceback of an error.
    """

    packed: Path | None
    run_dir: Path | None
    report: Path | None
    evaluation: Path | None
    repo: str | None
    seconds: Annotated[float, Range(">= 0")]
    out: Path | None
    overwrite: bool
    dry_run: bool
    debug: bool

    def __post_init__(self) -> None:
        check_ranges(self)
        require((self.packed is None) != (self.run_dir is None), "give one of packed=DIR and run_dir=DIR")


@dataclass(frozen=True, kw_only=True)
class DashboardConfig:
    """Everything that `qvgen dashboard` needs.

    Attributes:
        project: Project at Weights & Biases that gets the workspace, as logger.project of its runs.
        entity: Team or user that the project belongs to; None: the one that WANDB_API_KEY belongs to.
        name: Name of the workspace: a saved view of the project.
        dry_run: True shows sections and panels, and sends nothing.
        debug: True shows the traceback of an error.
    """

    project: str
    entity: str | None
    name: str
    dry_run: bool
    debug: bool
