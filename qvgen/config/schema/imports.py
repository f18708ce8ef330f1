"""The frozen dataclass of `qvgen import`; see :mod:`qvgen.config.schema.verbs`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from qvgen.config.bits import Bits
from qvgen.config.schema.sections import require
from qvgen.config.schema.value_range import Range, check_ranges

CLIPS = ("steps", "last", "mean")


@dataclass(frozen=True, kw_only=True)
class ImportNames:
    """The base model of `qvgen import`."""

    model: str | None


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Everything that `qvgen import` needs.

    Attributes:
        source: A checkpoint of QVGen's own release: its .safetensors file, or its folder (one file, or shards with an index).
        model: The model that the checkpoint was made from; its transformer says which tensors there must be.
        bits: Bit-widths that the checkpoint was trained with; it does not say them itself.
        clips: Which of the release's 50 groups of activation clips a call uses: ``steps``, one for each step of the release's
            sampler with its option --fix, and no other sampler; ``last``, the last one always, as without that option;
            ``mean``, their mean, for any sampler.
        num_steps: Sampling steps that clips=steps is laid out for.
        out: The packed directory that is written, with import.json, which says what was found and checked.
        overwrite: True replaces files of the same names that are there already; False refuses to.
        dry_run: True reads the headers alone, and says what would be imported.
        debug: True shows the traceback of an error.
        names: The option that was chosen from each group.
        plain: All of the above as a plain dict.
    """

    source: Path
    model: Any
    bits: Bits
    clips: str
    num_steps: Annotated[int, Range("> 0")]
    out: Path
    overwrite: bool
    dry_run: bool
    debug: bool
    names: ImportNames
    plain: dict[str, Any]

    def __post_init__(self) -> None:
        check_ranges(self)
        require(
            self.names.model is not None,
            "model is missing; write model=NAME, the model that the checkpoint was made from",
        )
        require(self.clips in CLIPS, f"clips={self.clips} is unknown; use one of {', '.join(CLIPS)}")
        require(
            self.out.resolve() != self.source.resolve(),
            f"out={self.out} is the checkpoint itself; write out=ANOTHER folder",
        )
