"""What the tests of validation videos compare: the files that they leave behind."""

from __future__ import annotations

import json
from pathlib import Path


def contents(directory: Path) -> dict[str, bytes]:
    """All files by name. The encoder does not repeat its bytes at the width of two videos: those are only listed."""
    found = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    for name, content in found.items():
        if "side-by-side" in name:
            found[name] = b""
        elif name.endswith("student.json"):
            record = json.loads(content)
            record["sha256"] = {key: value for key, value in record["sha256"].items() if "side-by-side" not in key}
            found[name] = json.dumps(record).encode()
    return found


def times(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
