"""Other people's runtimes, installed without their dependencies into folders of their own and run in processes of their own.

A package that can't be had is skipped visibly. The folders are kept between runs; QVGEN_CONSUMERS names where (the default is
below the user's cache folder).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _folder() -> Path:
    chosen = os.environ.get("QVGEN_CONSUMERS")
    return Path(chosen) if chosen else Path.home() / ".cache" / "qvgen" / "consumers"


def _installed(requirement: str) -> Path:
    """The folder with one package, without its dependencies; skips the test where it can't be installed."""
    target = _folder() / requirement.replace("==", "-")
    done = target / "installed"
    if not done.is_file():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--upgrade",
            "--target",
            str(target),
            requirement,
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if result.returncode:
            pytest.skip(f"{requirement} can't be installed: {result.stderr.strip().splitlines()[-1:]}")
        done.touch()
    return target


def run_program(requirements: Sequence[str], program: str, *arguments: str) -> str:
    """What a program of this folder prints in a process of its own, which can import these packages."""
    paths = [*(str(_installed(requirement)) for requirement in requirements), str(ROOT), str(ROOT / "kernels")]
    result = subprocess.run(
        [sys.executable, str(Path(__file__).parent / program), *arguments],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        | {"SDNQ_USE_TORCH_COMPILE": "0"},  # SDNQ compiles its products otherwise, which takes minutes
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="session")
def run_consumer() -> Callable[..., str]:
    """A function (requirement, program, *arguments) -> see :func:`run_program`."""

    def run(requirement: str, program: str, *arguments: str) -> str:
        return run_program([requirement], program, *arguments)

    return run
