"""The frozen dataclass of `qvgen export`; see :mod:`qvgen.config.schema.verbs`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvgen.config.schema.sections import require


@dataclass(frozen=True, kw_only=True)
class ExportNames:
    """The target of `qvgen export`."""

    export: str | None


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Everything that `qvgen export` needs.

    Attributes:
        packed: A packed directory.
        target: The format, a file of conf/export; on the command line target=NAME, and export.KEY=VALUE for its own keys.
        export: The target's object (a :class:`qvgen.deploy.exporters.base.Exporter`).
        out: Folder of the files that the target's runtime loads, parity.json and parity.html.
        approximate: True exports layers too that the target does not carry exactly: their weights are quantized again, or
            their inputs in another way than in training; parity.json says of each what became of it. False refuses to.
        overwrite: True replaces files of the same names that are there already; False refuses to.
        dry_run: True says what would be done, and of which layers it would not be exact.
        debug: True shows the traceback of an error.
        names: The option that was chosen from each group.
    """

    packed: Path
    target: str | None
    export: Any
    out: Path
    approximate: bool
    overwrite: bool
    dry_run: bool
    debug: bool
    names: ExportNames

    def __post_init__(self) -> None:
        require(self.target is not None, "target is missing; write target=NAME (qvgen export --help lists the targets)")
        require(
            self.out.resolve() != self.packed.resolve(),
            f"out={self.out} is the packed directory itself; write out=ANOTHER folder",
        )
