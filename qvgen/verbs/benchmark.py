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
from qvgen.verbs._benchmark_kernels import cpu_kernel, kernel_rows
from qvgen.verbs._benchmark_kernels_page import kernel_table
from qvgen.verbs._benchmark_loading import loading_rows, loading_table
from qvgen.verbs._benchmark_ptq import ptq_rows, ptq_table
from qvgen.verbs._benchmark_ptq_cost import cost_rows, cost_table
from qvgen.verbs._benchmark_step import step_rows, step_table
from qvgen.verbs._benchmark_training import training_rows, training_table

log = logging.getLogger(__name__)

_BENCHMARKS = {
    "ptq": (ptq_rows, ptq_table),
    "ptq_cost": (cost_rows, cost_table),
    "training": (training_rows, training_table),
    "kernels": (kernel_rows, kernel_table),
    "denoising_step": (step_rows, step_table),
    "loading": (loading_rows, loading_table),
}


def run(config: BenchmarkConfig) -> None:
    """Run the benchmark that ``what`` names."""
    torch.set_num_threads(config.run.strategy.threads)
    if config.run.dry_run and config.what == "kernels":
        print(f"kernels: shapes {', '.join(config.shapes)} on {list(config.threads)} threads, into {config.out}")
        return
    if config.run.dry_run and config.what in ("denoising_step", "loading"):
        others = ["unquantized"] if config.what == "denoising_step" else []
        widths = ", ".join([*others, *(width.label for width in config.widths)])
        print(f"{config.what} of {config.run.names.model}, {config.blocks} blocks: {widths}, into {config.out}")
        return
    if config.run.dry_run:
        cells = len(config.methods) * len(config.widths) * len(config.seeds)
        print(
            f"{config.what} on {config.run.names.model}: {cells} cells ({', '.join(config.methods)}), into {config.out}"
        )
        return
    config.out.mkdir(parents=True, exist_ok=True)
    environment = collect_environment()
    head = {
        "benchmark": config.what,
        "model": config.run.names.model,
        "revision": config.run.model.revision if config.what == "ptq" else None,  # the others have random weights
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
    name = f"{config.what.replace('_', '-')}-{_model_name(config)}"
    rows = []
    measure, table = _BENCHMARKS[config.what]
    for row in measure(config):
        rows.append(row)
        log.info("%s", row)
        # After every cell: a benchmark of hours that is killed has lost one.
        atomic_write(config.out / f"{name}.json", json.dumps({**head, "rows": rows}, indent=1).encode())
        stop_request.note(f"after {len(rows)} rows, which are in {config.out / name}.json")
    atomic_write(config.out / f"{name}.md", ("\n".join(table(head, rows)) + "\n").encode())
    print(config.out / f"{name}.md")


def _model_name(config: BenchmarkConfig) -> str:
    """Of the result's files: the model's, its repository's where the size is what counts, the device and kernel of kernels.

    One step of the same model on more frames is another page: attention's share grows with them. So is another processor's.
    """
    if config.what == "kernels":
        return f"cpu-{cpu_kernel()}"
    if config.what == "denoising_step":
        return f"{config.run.names.model}-{config.run.model.num_frames}-frames-{cpu_kernel()}"
    repository = getattr(config.run.model, "repository", "") if config.what == "ptq_cost" else ""
    return repository.rpartition("/")[2].lower() or config.run.names.model
