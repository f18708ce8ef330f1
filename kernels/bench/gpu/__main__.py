"""All parts, each in its own processes with its own time, then the report: ``python -m gpu OUT`` (see ../gpu.sh).

Exit code 0: every part ran to its end and nothing differed; 1: not so; 2: a command that can't be run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from gpu.page import Results, read_results, write_page
from gpu.part import write_json

LIMIT_S = 470.0
"""All parts together: eight minutes, less what the report takes. The last part has what the others left."""


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: The module's.
        seconds: What it may take.
        workers: Processes among which its cases are shared out; 1 where times are measured.
        warmers: Processes that compile its kernels first, each for a share of the cases; 0: they need no warming.
    """

    name: str
    seconds: float
    workers: int = 1
    warmers: int = 0


PARTS = (
    Part("correctness", 120.0, workers=14),
    Part("table", 150.0, warmers=8),
    Part("blocks", 110.0, warmers=6),
    Part("attention", 60.0, workers=14),
    Part("attention_gradient", 40.0, workers=14),
    Part("attention_times", 30.0, warmers=4),
    Part("fake_quantization", 40.0),
    Part("sanitizer", 50.0),
    Part("tiles", 200.0, warmers=14),
)
WARM_SHARE = 0.5
"""The part of a part's time that warming may take."""


def run_all(out: Path, names: list[str], *, rehearse: bool) -> dict[str, str]:
    """Run parts one after the other.

    Returns:
        Name of each part -> ``done``, ``failed``, ``cut off after N s`` or ``no time left``.
    """
    states: dict[str, str] = {}
    until = time.monotonic() + LIMIT_S
    for part in (part for part in PARTS if part.name in names):
        left = until - time.monotonic()
        seconds = min(part.seconds, left) if not rehearse else 600.0
        if seconds < 5.0:
            states[part.name] = "no time left"
            continue
        print(f"{part.name}: up to {seconds:.0f} s", flush=True)
        for pattern in (f"{part.name}.json", f"{part.name}-*.json"):  # of an earlier run, maybe with more processes
            for path in out.glob(pattern):
                path.unlink()
        began = time.monotonic()
        if part.warmers and not rehearse:
            warmers = min(part.warmers, os.cpu_count() or 1)
            _processes(part, out, warmers, WARM_SHARE * seconds, rehearse=rehearse, warm=True)
        workers = 1 if rehearse else min(part.workers, os.cpu_count() or 1)
        left = seconds - (time.monotonic() - began)
        states[part.name] = _processes(part, out, workers, left, rehearse=rehearse)
        print(f"{part.name}: {states[part.name]}, {time.monotonic() - began:.0f} s", flush=True)
        write_json(out / "run.json", states)
    return states


def _processes(part: Part, out: Path, count: int, seconds: float, *, rehearse: bool, warm: bool = False) -> str:
    """Share a part out among processes, and end those that take longer."""
    flags = [*(["--rehearse"] if rehearse else []), *(["--warm"] if warm else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    running = []
    for index in range(count):
        words = [sys.executable, "-m", "gpu.part", part.name, str(out), "--slice", f"{index}/{count}", *flags]
        with (out / f"{'warm-' if warm else ''}{part.name}-{index}.log").open("w") as log:
            running.append(
                subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
            )
    until = time.monotonic() + seconds
    states = []
    try:
        for process in running:
            try:
                code = process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                states.append(f"cut off after {seconds:.0f} s")
            else:
                states.append("done" if code == 0 else "failed")
    finally:  # also where this program is stopped by hand
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its compilers too
                process.wait()
    return next((state for state in states if state != "done"), "done")


def _refusal(*, rehearse: bool) -> str | None:
    """Why nothing can be measured here."""
    for name in ("torch", "numpy", "safetensors", "triton"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed; pip install {name}"
    import torch

    if not rehearse and not torch.cuda.is_available():
        return "torch finds no GPU; look at nvidia-smi and torch.version.cuda, or rehearse on the CPU with --rehearse"
    return None


def main() -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(prog="gpu.sh", description="Measure the GPU kernels on this machine's card.")
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--parts", default=",".join(part.name for part in PARTS), help="some parts, with commas")
    given = parser.parse_args()
    names = given.parts.split(",")
    if unknown := set(names) - {part.name for part in PARTS}:
        parser.error(f"--parts holds {', '.join(sorted(unknown))}; there are {', '.join(part.name for part in PARTS)}")
    if (reason := _refusal(rehearse=given.rehearse)) is not None:
        print(f"gpu.sh: {reason}", file=sys.stderr)
        return 2
    if given.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    given.out.mkdir(parents=True, exist_ok=True)
    states = run_all(given.out, names, rehearse=given.rehearse)
    results: Results = read_results(given.out)
    write_page(given.out / "gpu.md", results, states)
    if "tiles" in results.rows:
        from gpu.tiles import write_table

        write_table(results.rows["tiles"], given.out / "tiles.json")
    print(given.out / "gpu.md")
    return 0 if set(states.values()) == {"done"} and not results.wrong() else 1


if __name__ == "__main__":
    raise SystemExit(main())
