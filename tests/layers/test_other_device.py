"""Training, folding, packed layers and moved models on a device that is not the CPU; the checks are in files of their own.

Torch has to know the device before a process's first backward pass, so they run in one process beside this one.
"""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
CHECKS = (
    "layers/other_device_checks.py",
    "deploy/moved_model_checks.py",
    "deploy/offloaded_pipeline_checks.py",
    "training/device_run_checks.py",
)


def test_no_tensor_is_left_on_the_cpu_and_nothing_needs_float64_or_waits():
    files = [str(TESTS / name) for name in CHECKS]
    command = [sys.executable, "-m", "tests.pytest_program", "-q", "--no-header", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
