"""Which of the videos that a command asks for are there already, from a call of the same command that was stopped.

    out/.unfinished.json    {"of": what the videos are made from, "videos": {file name: {"asked": ..., "sha256": ...}}}

It is written after each video and deleted after the last one. Of several processes that write videos each has a record of its
own, .unfinished-1.json and so on. The same command goes on behind what they name; videos that another command made, or that
are no longer as they were written, are earlier results like any others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from qvgen.config.prompts.image_prompt import facts_of
from qvgen.config.prompts.prompt import PromptedVideo
from qvgen.deploy.manifest import file_sha256
from qvgen.run_directory import atomic_write

RECORD_FILES = ".unfinished*.json"


class UnfinishedVideos:
    """The record of one call.

    Args:
        out: Folder of the videos; it need not exist.
        parts: Says what all videos are made from, as JSON can hold it; asked only where a record is read or written.
        number: Which of several processes that write videos this is.
    """

    def __init__(self, out: Path, parts: Callable[[], Any], *, number: int = 0) -> None:
        self.path, self._out, self._parts = out / f".unfinished{f'-{number}' if number else ''}.json", out, parts
        self._known = self._records()
        self._own = self._read(self.path)

    @cached_property
    def _of(self) -> str:
        return hashlib.sha256(json.dumps(self._parts(), sort_keys=True).encode()).hexdigest()

    def _records(self) -> list[dict[str, dict[str, str]]]:
        """What earlier calls of the same command made, and this one so far; a record for each of the processes."""
        return [self._read(path) for path in self._files()]

    def _files(self) -> list[Path]:
        return sorted(self._out.glob(RECORD_FILES))

    def _read(self, path: Path) -> dict[str, dict[str, str]]:
        """What one record says; nothing where it is damaged or of another command."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            of = content["of"]
            videos = {
                name: {key: str(row[key]) for key in ("asked", "sha256")} for name, row in content["videos"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}
        return videos if of == self._of else {}

    def holds(self, path: Path, video: PromptedVideo) -> bool:
        """Whether the file is what this command makes of a caption and seed."""
        rows = [known[path.name] for known in self._known if path.name in known]
        sums = [row["sha256"] for row in rows if row["asked"] == _asked(video)]
        return bool(sums) and path.is_file() and file_sha256(path) in sums

    def add(self, path: Path, video: PromptedVideo) -> None:
        """Record a video that was written."""
        self._own[path.name] = {"asked": _asked(video), "sha256": file_sha256(path)}
        atomic_write(self.path, json.dumps({"of": self._of, "videos": self._own}, indent=1).encode())

    def count(self) -> int:
        """How many videos are there by now, by all processes."""
        return sum((self._out / name).is_file() for name in {name for record in self._records() for name in record})

    def finish(self) -> None:
        """All videos are there."""
        for path in self._files():
            path.unlink(missing_ok=True)


def _asked(video: PromptedVideo) -> str:
    return hashlib.sha256(json.dumps(facts_of(video), sort_keys=True).encode()).hexdigest()
