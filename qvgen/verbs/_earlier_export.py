"""The files of an earlier export: another one into the same folder stands for all of them, whatever names it has."""

from __future__ import annotations

import json
from pathlib import Path


def earlier_files(out: Path, *, report: str) -> tuple[str, ...]:
    """The files below a folder that the parity report in it lists, and that are still what it lists by their sizes.

    Shards of a model that has fewer of them now, or the config.json of another target, would be loaded with the new files.

    Args:
        out: The folder.
        report: Name of the report in it.
    """
    try:
        files = json.loads((out / report).read_text(encoding="utf-8"))["files"]
        listed = {str(name): entry["bytes"] for name, entry in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return ()
    folder = out.resolve()
    found = {name: (out / name).resolve() for name in listed}
    return tuple(
        name
        for name, path in found.items()
        if path.is_relative_to(folder) and path.is_file() and path.stat().st_size == listed[name]
    )
