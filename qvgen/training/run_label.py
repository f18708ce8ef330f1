"""What a logging service is told of a run besides its metrics, and the file that says which run a folder is there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD_FILE = "wandb_run.json"


@dataclass(frozen=True, kw_only=True)
class RunLabel:
    """What a logging service is told of a run.

    Attributes:
        name: The run in words, without its folder.
        tags: Words that it can be found by.
        settings: Its configuration, plain values.
        job_type: Kind of run, by which the service can group them; None: a training.
    """

    name: str
    tags: tuple[str, ...]
    settings: Mapping[str, Any]
    job_type: str | None = None


def was_logged(folder: Path) -> bool:
    """Whether a folder's run was logged at Weights & Biases."""
    return (folder / RECORD_FILE).is_file()


def logged_as(folder: Path) -> dict[str, Any]:
    """The id, name and group that a folder's run has at Weights & Biases.

    Raises:
        FileNotFoundError: It has none.
        OSError: The file can't be read.
        ValueError: It is damaged.
    """
    record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    if not isinstance(record, dict) or "group" not in record:
        raise ValueError(f"{folder / RECORD_FILE} lacks a group")
    if not all(isinstance(record.get(key), str) and record[key] for key in ("id", "name")):
        raise ValueError(f"{folder / RECORD_FILE} lacks an id or a name")
    return record
