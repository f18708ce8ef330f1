"""Deletion: a leaf is its file, its yaml and its own tests; whatever is left works without them. See delete_leaves.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_nothing_misses_a_leaf_that_is_deleted(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    left_out = shutil.ignore_patterns(
        "*.so"
    )  # bytecode is worth half of the time, and is not looked at without its source
    for folder in ("qvgen", "kernels", "conf", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=left_out)
    for file in ("pyproject.toml", "train.py"):
        shutil.copy(ROOT / file, copy)
    program = ROOT / "tests" / "deletion" / "delete_leaves.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(program), str(copy)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("nothing misses it") == 5
