"""All parts within their time: ``python -m train_gpu OUT`` (see ../train_gpu.sh).

Results are written after each row, so that what was measured is there when the time is up. Exit code 0: every row was
measured; 1: not so; 2: a command that can't be run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qvgen.evaluation.environment import git_revision
from qvgen.run_directory import atomic_write
from train_gpu.page import page
from train_gpu.parts import ROUNDS, measure_part

LIMIT_S = 465.0
"""All parts together: eight minutes, less what starting takes."""
PARTS = {"steps": 170.0, "blocks": 130.0, "runs": 465.0}
"""Part -> what it may take of the time; the last one has what the others left."""
METHODS = ("qvgen", "kd", "lsq")


def _measure(part: str, out: Path, *, seconds: float, rehearse: bool) -> str:
    """A part in a process of its own, which is ended when its time is up."""
    (out / f"{part}.json").unlink(missing_ok=True)
    process = multiprocessing.get_context("spawn").Process(target=measure_part, args=(part, str(out), rehearse))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return f"cut off after {seconds:.0f} s"
    return "done" if process.exitcode == 0 else f"failed with exit code {process.exitcode}"


def _runs(out: Path, *, seconds: float, rehearse: bool) -> Iterator[dict[str, Any]]:
    """Whole runs, while there is time."""
    model, steps = ("tiny", 4) if rehearse else ("tiny_wide", 500)
    until = time.monotonic() + seconds
    for method in METHODS[:1] if rehearse else METHODS:
        folder = out / "runs" / method
        phi = ["phi.ranks=[2]"] if rehearse else []
        words = [
            f"model={model}", f"method={method}", "bits=3", f"steps={steps}", "logger=csv", "evaluation.videos=0",
            "evaluation.quality_videos=1", f"run_dir={folder}", *phi,
        ]  # fmt: skip
        began = time.monotonic()
        command = [sys.executable, "-m", "qvgen.cli", "train", *words]
        with (out / f"run-{method}.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code: int | None = process.wait(max(1.0, until - began))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                code = process.wait()
        row: dict[str, Any] = {"method": method, "seconds": time.monotonic() - began}
        if code:
            row["error"] = f"ended with exit code {code}; see run-{method}.log"
        else:
            errors = json.loads((folder / "report.json").read_text())["relative_error"]
            row |= {"start": errors["ptq"], "trained": errors["packed"]}
        yield row


def _refusal(*, rehearse: bool) -> str | None:
    if not rehearse and not torch.cuda.is_available():
        return "torch finds no GPU; look at nvidia-smi and torch.version.cuda, or rehearse on the CPU with --rehearse"
    return None


def main() -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(prog="train_gpu.sh", description="Measure training steps on this machine's card.")
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--parts", default=",".join(PARTS), help="some parts, with commas")
    given = parser.parse_args()
    names = given.parts.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"--parts holds {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if (reason := _refusal(rehearse=given.rehearse)) is not None:
        print(f"train_gpu.sh: {reason}", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + (3600.0 if given.rehearse else LIMIT_S)
    states: dict[str, str] = {}
    for name in (name for name in PARTS if name in names):
        seconds = min(3600.0 if given.rehearse else PARTS[name], until - time.monotonic())
        if seconds < 10:
            states[name] = "no time left"
        elif name == "runs":
            found = []
            for row in _runs(given.out, seconds=seconds, rehearse=given.rehearse):
                found.append(row)
                atomic_write(given.out / "runs.json", json.dumps(found, indent=1).encode())
            states[name] = "failed" if any("error" in row for row in found) else "done"
        else:
            states[name] = _measure(name, given.out, seconds=seconds, rehearse=given.rehearse)
        print(f"{name}: {states[name]}", flush=True)
    return _report(given.out, states, rehearse=given.rehearse)


def _report(out: Path, states: dict[str, str], *, rehearse: bool) -> int:
    results = {
        name: json.loads((out / f"{name}.json").read_text()) for name in states if (out / f"{name}.json").is_file()
    }
    commit, is_dirty = git_revision(Path(__file__))
    head = {
        "device": "CPU (rehearsal: times mean nothing)" if rehearse else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": f"{commit}{' with changes' if is_dirty else ''}",
        "rounds": 1 if rehearse else ROUNDS,
        "command": shlex.join(["bash", "benchmarks/train_gpu.sh", *sys.argv[1:]]),
        "states": states,
    }
    atomic_write(out / "train_gpu.json", json.dumps({**head, **results}, indent=1).encode())
    atomic_write(out / "train_gpu.md", ("\n".join(page(head, results)) + "\n").encode())
    print(out / "train_gpu.md")
    is_whole = set(states.values()) == {"done"} and not any(
        "error" in row for rows_ in results.values() for row in rows_
    )
    return 0 if is_whole else 1


if __name__ == "__main__":
    raise SystemExit(main())
