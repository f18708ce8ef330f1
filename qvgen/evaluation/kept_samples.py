"""Batches of videos and of outputs, kept until the report is written: a run that was stopped does not compute them again.

    run_dir/sampled/MODEL-PART-NNNN.safetensors    frames: uint8 [B, F, H, W, 3], or outputs float32 [B, C, F, H, W];
                                                   facts: JSON as bytes; sealed with a key

The key says what they were made from: configuration, packed weights, full-precision weights, what changed under
``resume=force``. A file with another key, or a damaged one, is sampled again. Any process of the run may write one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qvgen.config.run_comparison import lasting
from qvgen.data.sealed_tensors import DamagedFileError, read_sealed, write_sealed
from qvgen.deploy.manifest import read_manifest
from qvgen.run_identity import read_changes

log = logging.getLogger(__name__)

DIRECTORY = "sampled"

OUTPUTS = "outputs"
"""In the names of batches of outputs."""


@dataclass(frozen=True, kw_only=True)
class BatchFacts:
    """The cost of sampling a batch of videos, and the kernels that did.

    Attributes:
        dtype: Type of the model's unquantized weights.
        kernels: Backends that ran its packed layers.
        seconds: Wall clock.
        weight_bytes: All tensors that the model holds.
        working_bytes: Largest memory besides the weights; None where it cannot be measured.
        is_warm: Whether the process had sampled with the model before.
        widths_sum: Sum of the activation widths that a policy chose, over samples and calls.
        widths_count: Number of those choices; 0 without a policy.
    """

    dtype: str
    kernels: tuple[str, ...]
    seconds: float
    weight_bytes: int
    working_bytes: int | None
    is_warm: bool
    widths_sum: int
    widths_count: int


@dataclass(frozen=True, kw_only=True)
class SampledBatch:
    """Some videos of one model, uint8 [B, F, H, W, 3], or outputs float32 [B, C, F, H, W], and what they took."""

    frames: Tensor
    facts: BatchFacts


class KeptSamples:
    """The videos of a run whose packed directory is written.

    Args:
        run_dir: The run's folder.
        key: What they are made from; see :func:`samples_key`.

    Attributes:
        run_dir: The run's folder.
    """

    def __init__(self, run_dir: Path, *, key: str) -> None:
        self.run_dir, self.folder, self.key = run_dir, run_dir / DIRECTORY, key

    def has_file(self, name: str) -> bool:
        """Whether there is a file of a batch, whole or not."""
        return self._path(name).is_file()

    def read(self, name: str) -> SampledBatch | None:
        """A batch that is kept; None where there is none, or a damaged one, which is said."""
        try:
            tensors = read_sealed(self._path(name), key=self.key)
        except FileNotFoundError:
            return None
        except DamagedFileError as error:
            what = "outputs are computed" if f"-{OUTPUTS}" in name else "videos are sampled"
            log.warning("%s; its %s again", error, what)
            return None
        facts = json.loads(tensors["facts"].numpy().tobytes())
        return SampledBatch(frames=tensors["frames"], facts=BatchFacts(**{**facts, "kernels": tuple(facts["kernels"])}))

    def write(self, name: str, sampled: SampledBatch) -> None:
        """Keep a batch."""
        facts = json.dumps(asdict(sampled.facts)).encode()
        tensors = {"frames": sampled.frames, "facts": torch.frombuffer(bytearray(facts), dtype=torch.uint8)}
        write_sealed(self._path(name), tensors, key=self.key)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def samples_key(run_dir: Path, *, settings: Mapping[str, Any], revision: str) -> str:
    """A checksum of all that the videos of a run are made from; its packed directory is written.

    Args:
        run_dir: The run's folder.
        settings: The run's configuration as plain values, all of it: what decides the videos and what does not is told apart
            here.
        revision: Revision of the full-precision model.
    """
    parts = [
        lasting(settings),
        read_manifest(run_dir / "packed").sha256,
        revision,
        [asdict(change) for change in read_changes(run_dir)],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def forget_samples(run_dir: Path) -> None:
    """Delete what was kept: the report is written, and holds what is shown."""
    shutil.rmtree(run_dir / DIRECTORY, ignore_errors=True)
