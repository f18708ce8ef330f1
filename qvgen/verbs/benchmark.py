"""Measure methods against each other in one run: rows with every value as JSON, a table as Markdown."""

from __future__ import annotations

import json
import logging

import torch

from qvgen import stop_request
from qvgen.config.command_line import command_line
from qvgen.config.verb_schema import BenchmarkConfig
from qvgen.evaluation.environment import collect_environment
from qvgen.run_directory import atomic_write
from qvgen.verbs.benchmarks.base import load_benchmark

log = logging.getLogger(__name__)


def run(config: BenchmarkConfig) -> None:
    """Run the benchmark that ``what`` names."""
    benchmark = load_benchmark(config.what)
    torch.set_num_threads(config.run.strategy.threads)
    if config.run.dry_run:
        print(f"{benchmark.describe(config)}, into {config.out}")
        return
    config.out.mkdir(parents=True, exist_ok=True)
    environment = collect_environment()
    head = {
        "benchmark": config.what,
        "model": config.run.names.model,
        "revision": config.run.model.revision if benchmark.real_weights else None,
        "profile": config.run.profile.name,
        "samples": config.run.evaluation.samples,
        "videos": config.videos,
        "timed_steps": config.timed_steps,
        "memory_gib": config.run.calibration.memory_gib,
        "command": command_line("benchmark", config.run.typed),
        "machine": environment.machine.to_json_dict(),
        "versions": dict(environment.versions),
        "git_sha": environment.git_sha,
    }
    name = f"{config.what.replace('_', '-')}-{benchmark.subject(config)}"
    rows = []
    for row in benchmark.rows(config):
        rows.append(row)
        log.info("%s", row)
        # After every cell: a benchmark of hours that is killed has lost one.
        atomic_write(config.out / f"{name}.json", json.dumps({**head, "rows": rows}, indent=1).encode())
        stop_request.note(f"after {len(rows)} rows, which are in {config.out / name}.json")
    atomic_write(config.out / f"{name}.md", ("\n".join(benchmark.table(head, rows)) + "\n").encode())
    print(config.out / f"{name}.md")
