"""Which of the videos that a command asks for are there already, from a call of the same command that was stopped.

    out/.unfinished.json    {"of": what the videos are made from, "videos": {file name: {"asked": ..., "sha256": ...}}}

It is written after each video and deleted after the last one. The same command goes on behind what it names; videos that
another command made, or that are no longer as they were written, are earlier results like any others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from qvgen.config.image_prompt import facts_of
from qvgen.config.prompt import PromptedVideo
from qvgen.deploy.manifest import file_sha256
from qvgen.run_directory import atomic_write

RECORD_FILE = ".unfinished.json"


class UnfinishedVideos:
    """The record of one call.

    Args:
        out: Folder of the videos; it need not exist.
        parts: Says what all videos are made from, as JSON can hold it; asked only where a record is read or written.
    """

    def __init__(self, out: Path, parts: Callable[[], Any]) -> None:
        self.path, self._parts = out / RECORD_FILE, parts
        self._videos = self._read() if self.path.is_file() else {}

    @cached_property
    def _of(self) -> str:
        return hashlib.sha256(json.dumps(self._parts(), sort_keys=True).encode()).hexdigest()

    def _read(self) -> dict[str, dict[str, str]]:
        """What an earlier call of the same command made; nothing from a record that is damaged or of another one."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            of = content["of"]
            videos = {
                name: {key: str(row[key]) for key in ("asked", "sha256")} for name, row in content["videos"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}
        return videos if of == self._of else {}

    def holds(self, path: Path, video: PromptedVideo) -> bool:
        """Whether the file is what this command makes of a caption and seed."""
        known = self._videos.get(path.name)
        return (
            known is not None
            and known["asked"] == _asked(video)
            and path.is_file()
            and file_sha256(path) == known["sha256"]
        )

    def add(self, path: Path, video: PromptedVideo) -> None:
        """Record a video that was written."""
        self._videos[path.name] = {"asked": _asked(video), "sha256": file_sha256(path)}
        atomic_write(self.path, json.dumps({"of": self._of, "videos": self._videos}, indent=1).encode())

    def finish(self) -> None:
        """All videos are there."""
        self.path.unlink(missing_ok=True)


def _asked(video: PromptedVideo) -> str:
    return hashlib.sha256(json.dumps(facts_of(video), sort_keys=True).encode()).hexdigest()
