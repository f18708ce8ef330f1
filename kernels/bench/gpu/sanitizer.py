"""NVIDIA's compute-sanitizer on a small case, where the tool is: accesses beyond a tensor, races in shared memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from gpu.setting import Case, Row, Setting

TOOLS = ("memcheck", "racecheck")
SECONDS = 60
"""What each of them may take."""

PROGRAM = """
from gpu.correctness import _check
from gpu.setting import Setting
from qvgen_kernels import LinearTensors
from tests.kernels.cpu_cases import Case
from tests.kernels.layer import make_layer, make_rows
for bits in (3, 4, 8):
    layer = make_layer(in_features=150, out_features=70, weight_bits=bits, activation_bits=8)
    rows = list(_check(Case(layer, make_rows(35, 150), LinearTensors(bias=layer.bias)), Setting({rehearse})))
    assert rows and all(row["equal"] for row in rows), rows
"""


def cases(setting: Setting, *, warm: bool = False) -> Iterator[Case]:
    """One case for each tool."""
    if not warm:
        for tool in TOOLS:
            yield tool, partial(_run, setting, tool)


def _run(setting: Setting, tool: str) -> Iterator[Row]:
    program = find_tool()
    if program is None:
        yield {"not there": "no compute-sanitizer on PATH, in CUDA_HOME or in /usr/local/cuda; it comes with CUDA"}
        return
    command = [program, "--tool", tool, sys.executable, "-c", PROGRAM.format(rehearse=setting.rehearse)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        yield {"error": f"{tool} took more than {SECONDS} s"}
        return
    text = done.stdout + done.stderr
    found = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", text)
    count = sum(int(first or second) for first, second in found)
    yield {"equal": bool(found) and count == 0 and done.returncode == 0, "found": count, "text": text[-1500:]}


def find_tool() -> str | None:
    """The tool's path."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    places = [
        shutil.which("compute-sanitizer"),
        *(str(Path(home) / "bin" / "compute-sanitizer") for home in homes if home),
    ]
    return next((place for place in places if place and os.access(place, os.X_OK)), None)
