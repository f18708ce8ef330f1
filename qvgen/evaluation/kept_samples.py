"""Videos of each model, kept until the report is written: a run that is stopped in between does not sample them again.

    run_dir/sampled/NAME.safetensors    shown, table: uint8 [B, F, H, W, 3]; facts: JSON as bytes; sealed with a key

The key says what they were made from: configuration, packed weights, full-precision weights, what changed under
``resume=force``. A file with another key, or a damaged one, is sampled again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qvgen.config.run_comparison import lasting
from qvgen.data.sealed_tensors import DamagedFileError, read_sealed, write_sealed
from qvgen.deploy.manifest import read_manifest
from qvgen.evaluation.quality_data import SamplingCost
from qvgen.run_identity import read_changes

log = logging.getLogger(__name__)

DIRECTORY = "sampled"


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """One model's videos, uint8 [B, F, H, W, 3], and what they took."""

    shown: Tensor
    table: Tensor
    cost: SamplingCost
    activation_bits: float | None


class KeptSamples:
    """The videos of a run whose packed directory is written.

    Args:
        run_dir: The run's folder.
        settings: The run's configuration as plain values, all of it: what decides the videos and what does not is told apart
            here.
        revision: Revision of the full-precision model.

    Attributes:
        run_dir: The run's folder.
    """

    def __init__(self, run_dir: Path, *, settings: Mapping[str, Any], revision: str) -> None:
        parts = [
            lasting(settings),
            read_manifest(run_dir / "packed").sha256,
            revision,
            [asdict(change) for change in read_changes(run_dir)],
        ]
        self.run_dir, self.folder = run_dir, run_dir / DIRECTORY
        self._key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def get(self, name: str, sample: Callable[[], Sampled]) -> Sampled:
        """A model's videos: those that are kept, else ``sample``'s, which are kept from then on."""
        sampled = self.read(name)
        if sampled is None:
            sampled = sample()
            self.write(name, sampled)
        return sampled

    def read(self, name: str) -> Sampled | None:
        """The videos that are kept of a model."""
        try:
            tensors = read_sealed(self.folder / f"{name}.safetensors", key=self._key)
        except FileNotFoundError:
            return None
        except DamagedFileError as error:
            log.warning("%s; its videos are sampled again", error)
            return None
        facts = json.loads(tensors["facts"].numpy().tobytes())
        cost = {**facts["cost"], "kernels": tuple(facts["cost"]["kernels"])}
        log.info("videos of %s: kept from before the run was stopped", name)
        return Sampled(
            shown=tensors["shown"],
            table=tensors["table"],
            cost=SamplingCost(**cost),
            activation_bits=facts["activation_bits"],
        )

    def write(self, name: str, sampled: Sampled) -> None:
        """Keep a model's videos."""
        facts = json.dumps({"cost": asdict(sampled.cost), "activation_bits": sampled.activation_bits}).encode()
        tensors = {
            "shown": sampled.shown,
            "table": sampled.table,
            "facts": torch.frombuffer(bytearray(facts), dtype=torch.uint8),
        }
        write_sealed(self.folder / f"{name}.safetensors", tensors, key=self._key)


def forget_samples(run_dir: Path) -> None:
    """Delete what was kept: the report is written, and holds what is shown."""
    shutil.rmtree(run_dir / DIRECTORY, ignore_errors=True)
