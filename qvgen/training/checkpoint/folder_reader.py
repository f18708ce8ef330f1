"""Reads a sharded checkpoint (checkpoint_folder.py): every byte has a checksum, and nothing that is read is executed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qvgen.errors import UserError
from qvgen.quant.finite import check_finite
from qvgen.training.checkpoint.exact_json import decode
from qvgen.training.checkpoint.folder import FORMAT, INDEX_FILE, VERSION, content_checksum
from qvgen.training.checkpoint.part import Part
from qvgen.training.checkpoint.saved_tensor import SavedTensor


class CheckpointFolder:
    """A checkpoint folder that is read: its index and parts are looked at, its tensors are not read yet.

    Args:
        path: The folder.

    Attributes:
        state: The checkpoint as Lightning has it. A tensor of shares is a :class:`SavedTensor`, any other is read.
        step: Optimizer steps done.
        run: The run's mark.

    Raises:
        UserError: A file is damaged or missing; the message says what to do.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with refused(path, path / INDEX_FILE):
            content = _read_index(path)
            self.step, self.run = int(content["step"]), content["run"]
            names: dict[str, str] = content["parts"]
        self._parts = [self._part(name, checksum) for name, checksum in names.items()]
        found: dict[str, list[Part]] = {}
        for part in self._parts:
            for name in part.tensors:
                found.setdefault(name, []).append(part)
        with refused(path, path / INDEX_FILE):
            self._tensors = {name: SavedTensor(name, parts) for name, parts in found.items()}
            self.state: dict[str, Any] = decode(content["state"], tensor=self._tensor)

    def check(self, *, only: Collection[str] | None = None) -> None:
        """Read tensors, and raise UserError for one that is not as it was written, or not finite.

        What callbacks keep may be infinite: a best value so far.

        Args:
            only: First parts of the names that are looked at, for example ``state_dict``; None: all.
        """
        wanted = [
            (part, name)
            for part in self._parts
            for name in part.tensors
            if only is None or name.partition("/")[0] in only
        ]
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(self._check_tensor, wanted):
                pass

    def _check_tensor(self, wanted: tuple[Part, str]) -> None:
        part, name = wanted
        with refused(self.path, part.file):
            is_finite = part.check_tensor(name)
        if not is_finite and not name.startswith("callbacks/"):
            check_finite([(name, part.whole(name))], source=str(part.file), remedy=_remedy(self.path))

    def _part(self, name: str, checksum: str) -> Part:
        with refused(self.path, self.path / name):
            content = (self.path / name).read_bytes()
            if hashlib.sha256(content).hexdigest() != checksum:
                raise ValueError("it is not the one that was written")
            part = Part(self.path, name, content)
        with refused(self.path, part.file):
            part.check_header()
        return part

    def _tensor(self, name: str) -> Any:
        saved = self._tensors[name]
        return saved if saved.is_shared_out else saved.whole()


@contextmanager
def refused(path: Path, file: Path) -> Iterator[None]:
    """Raise UserError, with what to do, where a file of the checkpoint ``path`` is not what it should be."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing, so that {path.name} is no whole checkpoint; {_remedy(path)}") from error
    except OSError as error:
        if isinstance(error, PermissionError | IsADirectoryError) or error.errno == errno.EIO:
            raise UserError(f"{file} can't be read ({error.strerror})") from error
        raise _damaged(path, file, error) from error
    except (
        SafetensorError, ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error, RuntimeError,
        OverflowError,
    ) as error:  # fmt: skip
        raise _damaged(path, file, error) from error


def _damaged(path: Path, file: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return UserError(f"{file} is damaged or no part of this checkpoint; {_remedy(path)} ({reason})")


def _remedy(path: Path) -> str:
    return f"delete the folder {path.name} to resume from the one before"


def _read_index(path: Path) -> dict[str, Any]:
    whole = json.loads((path / INDEX_FILE).read_bytes())
    content: dict[str, Any] = whole["content"]
    if content["format"] != FORMAT:
        raise ValueError(f"its format is {content['format']}")
    if content["version"] != VERSION:
        raise ValueError(f"its version is {content['version']}, and this qvgen reads {VERSION}")
    if whole["sha256"] != content_checksum(content):
        raise ValueError("its content does not have its checksum")
    return content
