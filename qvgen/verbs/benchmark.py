"""Measure methods against each other in one run: rows with every value as JSON, a table as Markdown."""

from __future__ import annotations

import json
import logging

from qvgen import stop_request
from qvgen.config.command_line import command_line
from qvgen.config.schema.verbs import BenchmarkConfig
from qvgen.cpu_threads import set_threads
from qvgen.errors import UserError
from qvgen.evaluation.environment import collect_environment
from qvgen.run_directory import atomic_write
from qvgen.verbs._earlier_result import refuse_earlier
from qvgen.verbs._unfinished_rows import UnfinishedRows, command_key, revision_of
from qvgen.verbs.benchmarks.base import load_benchmark

log = logging.getLogger(__name__)


def run(config: BenchmarkConfig) -> None:
    """Run the benchmark that ``what`` names; the same command goes on with one that was stopped.

    Raises:
        UserError: ``shapes`` for a benchmark that has none.
        ValueError: Its files are there from another call.
    """
    benchmark = load_benchmark(config.what)
    if config.shapes is not None and not benchmark.shapes:
        raise UserError(f"shapes={list(config.shapes)} are not of what={config.what}, which has none; leave shapes out")
    set_threads(config.run.strategy.threads)
    name = f"{config.what.replace('_', '-')}-{benchmark.subject(config)}"
    results, page, picture = (config.out / f"{name}.{suffix}" for suffix in ("json", "md", "svg"))
    earlier = UnfinishedRows.read(results, config, benchmark)
    if not earlier.found:
        names = [results.name, page.name, *([] if benchmark.plot is None else [picture.name])]
        refuse_earlier(config.out, names, overwrite=config.overwrite)
    described = benchmark.describe(config)  # which refuses what can't be measured
    if config.run.dry_run:
        print(f"{described}, into {config.out}")
        return
    config.out.mkdir(parents=True, exist_ok=True)
    environment = collect_environment()
    head = {
        "benchmark": config.what,
        "model": config.model_name,
        "revision": revision_of(config) if benchmark.real_weights else None,
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
    rows, of = list(earlier.rows), command_key(config, benchmark)

    def write(**state: str) -> None:
        with stop_request.undivided():
            atomic_write(results, json.dumps({**head, **state, "rows": rows}, indent=1).encode())
            stop_request.note(f"after {len(rows)} rows, which are in {results}")
            stop_request.continue_with({})

    if earlier.found:
        log.info("%s: %d rows are kept of a call that was stopped", results, len(rows))
        write(unfinished=of)
    for row in benchmark.rows(config, done=earlier.groups):
        rows.append(row)
        log.info("%s", row)
        write(unfinished=of)  # after every row: a benchmark that is killed loses only the row that it was measuring
    if benchmark.plot is not None:
        benchmark.plot(rows, picture)
    atomic_write(page, ("\n".join(benchmark.table(head, rows)) + "\n").encode())
    write()  # at last: until here the same command goes on
    print(page)
