"""Training steps, folding and packed layers on a device that is not the CPU; the checks are in other_device_checks.py."""

import subprocess
import sys
from pathlib import Path


def test_no_tensor_is_left_on_the_cpu_and_nothing_needs_float64_or_waits():
    checks = Path(__file__).with_name("other_device_checks.py")
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
