"""The end of `qvgen ptq evaluation.samples=0`: fold, pack, read back, compare the codes; no errors, no videos."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import nn

from qvgen.config.schema.train import TrainConfig
from qvgen.deploy.checkpoint import load_packed
from qvgen.deploy.manifest import WEIGHTS_FILE, read_manifest
from qvgen.evaluation.environment import collect_environment
from qvgen.evaluation.packed_checks import bf16_bytes, codes_equal, layer_reports
from qvgen.layers.attention_swap import packed_attentions
from qvgen.run_directory import atomic_write
from qvgen.run_identity import read_changes
from qvgen.training.start.student import fold_student
from qvgen.verbs._deliver import run_info
from qvgen.verbs._parts import named_family, packed_record


def deliver_unmeasured(
    config: TrainConfig,
    path: Path,
    *,
    start: Mapping[str, float],
    teacher: nn.Module,
    student: nn.Module,
    why: str,
) -> None:
    """Write the packed directory and a report.json whose errors are null.

    Args:
        config: The run's.
        path: The run's folder.
        start: Seconds of the method.
        teacher: Full-precision model, for its size.
        student: What the method has set up.
        why: Nothing was measured, in words.
    """
    began = time.monotonic()
    record = packed_record(config, steps=config.steps)
    fold_student(student, path / "packed", model=named_family(config), training=record, kernel=config.kernel)
    packed = load_packed(path / "packed", kernel=config.kernel)  # as a user would
    seconds = {"init": start["seconds"], "train": 0.0, "fold": time.monotonic() - began, "generate": 0.0}
    equal, count = codes_equal(student, packed)
    info = asdict(run_info(config))
    config_yaml = info.pop("config_yaml")
    environment = collect_environment()
    size = {"bf16": bf16_bytes(teacher), "packed": (path / "packed" / WEIGHTS_FILE).stat().st_size}
    report = {
        **info,
        "config": config_yaml,
        "layers_quantized": [layer.name for layer in layer_reports(packed)],
        "layers_skipped": list(read_manifest(path / "packed").skipped),
        "attentions_quantized": list(packed_attentions(packed)),
        "relative_error": dict.fromkeys(("rtn", "ptq", "qat", "packed")),
        "relative_error_measured_on": {"num_samples": 0, "split": why, "seed": config.seed},
        "packed_codes_equal": equal,
        "num_codes": count,
        "packed_vs_fake_max_abs": None,
        "phi_rank_final": 0,
        "phi_kept": False,
        "quality": None,
        "verdict": None,
        "sampling": None,
        "bytes": size,
        "seconds": seconds,
        "versions": dict(environment.versions),
        "git_sha": environment.git_sha,
        "machine": environment.machine.to_json_dict(),
        "changes": [asdict(change) for change in read_changes(path)],
    }
    atomic_write(path / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    print(f"report: {path / 'report.json'}")
    print(f"measured: {why}; {count} codes in the packed file {'are' if equal else 'ARE NOT'} those of the method")
    print(f"size: {size['packed'] / 1024:.0f} KiB packed, {size['bf16'] / 1024:.0f} KiB in bfloat16")
