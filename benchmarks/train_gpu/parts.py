"""What is measured in which part, and a part's process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qvgen.run_directory import atomic_write
from train_gpu.variants import Case, rows

ROUNDS = 5
CASES = {
    "steps": (Case(model="cogvideox"),),
    "blocks": tuple(Case(model="wan-14b", blocks=count) for count in (1, 2, 4)),
}
REHEARSED = {
    "steps": (Case(model="tiny", variants=("plain", "quantized", "integers", "with Phi", "unfused")),),
    "blocks": (Case(model="tiny", blocks=1, variants=("plain", "with Phi")),),
}


def measure_part(part: str, out: str, rehearse: bool) -> None:
    """Measure a part's rows, each written as soon as it is there."""
    device = torch.device("cpu" if rehearse else "cuda")
    cases, rounds = (REHEARSED if rehearse else CASES)[part], 1 if rehearse else ROUNDS
    found: list[dict[str, Any]] = []
    for row in rows(cases, device, rounds=rounds):
        found.append(row)
        print(f"{row['model']}, {row['variant']}: {row.get('error') or row['micro_batch_s']}", flush=True)
        atomic_write(Path(out) / f"{part}.json", json.dumps(found, indent=1).encode())
