"""The values that were measured of each video, kept so that an evaluation that was stopped does not measure it again.

    FOLDER/NAME.json    {"key": what it was measured from and by, "values": ...}

A file with another key, or a damaged one, counts as not there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvgen.run_directory import atomic_write


class ValueFiles:
    """The files of one folder.

    Args:
        folder: Where they are; it need not exist.
        measured_by: Says what measures, as JSON can hold it.
    """

    def __init__(self, folder: Path, measured_by: Any) -> None:
        self.folder, self._measured_by = folder, measured_by

    def key(self, *parts: Any) -> str:
        """Checksum of what measures and of what is measured."""
        return hashlib.sha256(json.dumps([self._measured_by, parts], sort_keys=True).encode()).hexdigest()

    def read(self, name: str, *, key: str) -> dict[str, Any] | None:
        """The values of a video; None: they were not measured, or of something else."""
        try:
            content = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            values = content["values"] if content["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return values if isinstance(values, dict) else None

    def write(self, name: str, values: Mapping[str, Any], *, key: str) -> None:
        """Keep the values of a video."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"key": key, "values": values}, allow_nan=False) + "\n"
        atomic_write(self.folder / f"{name}.json", content.encode())
