"""A sharded checkpoint: a folder that all processes of a run write together, each its own rows.

    step-00000050.ckpt/
        rank-00001-of-00002.safetensors, .json      a part for each process, see checkpoint_part.py
        index.json  {"content": {"format": "qvgen-checkpoint", "version": 1, "step": 50, "run": KEY,
                                 "parts": {"rank-00001-of-00002.json": SHA-256, ...}, "state": ...},
                     "sha256": of the content}

``state`` is what Lightning calls a checkpoint (loops, schedulers, groups of parameters, callbacks) as exact_json.py writes
it, a name of a tensor in the place of each tensor. What every process has alike (buffers, step counts) is rank 0's to write.

    .step-00000050.ckpt.tmp/    rank 0 makes it, and removes what a killed run left
      parts                     each process writes its own, and forces it to the disk
      index.json                rank 0, once it has the checksums of all parts
    step-00000050.ckpt/         rank 0 renames the folder

So a checkpoint is whole or not there. An index leads to every byte: it has a checksum of its own and those of the parts,
and a part those of its tensors. Nothing that is read is executed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from qvgen.errors import UnfitEnvironmentError, UserError, one_line
from qvgen.quant.finite import check_finite
from qvgen.training.checkpoint_part import Part, Share, check_kept, force, part_name, write_part
from qvgen.training.exact_json import decode, encode
from qvgen.training.replaced_folder import put_in_place
from qvgen.training.saved_tensor import SavedTensor
from qvgen.unfinished import unfinished

FORMAT, VERSION = "qvgen-checkpoint", 1
INDEX_FILE = "index.json"

Exchange = Callable[[Any], list[Any]]
"""Gives every process the values of all, by rank: what JSON can hold."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """What a process writes of a state.

    Attributes:
        shares: Its tensors by name.
        state: The plain values around them, for JSON.
        step: Optimizer steps done.
        run: The run's mark; None where it has none.
    """

    shares: Mapping[str, Share]
    state: Any
    step: int
    run: str | None

    def on_host(self) -> Snapshot:
        """A copy in this host's memory that training does not change any more."""
        shares = {name: share.on_host() for name, share in self.shares.items()}
        return Snapshot(shares=shares, state=self.state, step=self.step, run=self.run)


def take_snapshot(checkpoint: Mapping[str, Any], *, run: str | None, rank: int) -> Snapshot:
    """What a process writes of a checkpoint as Lightning has it; tensors are those that training goes on with.

    Args:
        checkpoint: Plain values, tensors, and shares of tensors (:class:`~qvgen.training.checkpoint_part.Share`).
        run: The run's mark.
        rank: This process.

    Raises:
        UserError: A value or a tensor is of a kind that no checkpoint keeps.
    """
    shares: dict[str, Share] = {}

    def take(name: str, value: Any) -> str | None:
        if isinstance(value, Share):
            shares[name] = value
        elif isinstance(value, Tensor):
            check_kept(name, value)
            if rank == 0:
                shares[name] = Share(rows=value.detach(), shape=value.shape)
        else:
            return None
        return name

    try:
        state = encode(dict(checkpoint), tensor=take)
    except RecursionError as error:
        raise UserError("the state of a callback is nested too deeply for a checkpoint") from error
    return Snapshot(shares=shares, state=state, step=int(checkpoint["global_step"]), run=run)


def write_folder(path: Path, snapshot: Snapshot, *, rank: int, world_size: int, exchange: Exchange) -> None:
    """Write a checkpoint, as one of the processes that do; all of them call it.

    Args:
        path: The folder.
        snapshot: What this process writes.
        rank: This process.
        world_size: All.
        exchange: Reaches the others.

    Raises:
        OSError: A process can't write; ``path`` is as it was, and nothing is left beside it. All processes raise it.
        RuntimeError: A process fails in another way; likewise.
    """
    temporary = temporary_folder(path)
    with unfinished(temporary):
        try:
            _together(exchange, partial(_begin, path, temporary, is_first=rank == 0), path)
            parts = _together(
                exchange, partial(write_part, temporary, snapshot.shares, rank=rank, world_size=world_size), path
            )
            names = [f"{part_name(other, world_size)}.json" for other in range(world_size)]
            finish = partial(_finish, path, temporary, snapshot, parts=dict(zip(names, parts, strict=True)))
            _together(exchange, finish if rank == 0 else lambda: None, path)
        except BaseException:
            if rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise


def temporary_folder(path: Path) -> Path:
    """Where a checkpoint is written before it is one."""
    return path.with_name(f".{path.name}.tmp")


def _together(exchange: Exchange, work: Callable[[], Any], path: Path) -> list[Any]:
    """What work gives in each process; where it fails in one, all raise that."""
    result, error = None, None
    try:
        result = work()
    except Exception as failure:  # the others would wait for this process
        error = failure
    answers = exchange({"result": result, "error": None if error is None else _said(error)})
    for rank, answer in enumerate(answers):
        if answer["error"] is not None:
            raise _heard(answer["error"], rank=rank, path=path) from error
    return [answer["result"] for answer in answers]


def _said(error: Exception) -> dict[str, Any]:
    """An error for the other processes."""
    if isinstance(error, OSError):
        what, file = error.strerror or str(error), str(error.filename or "")
        return {"kind": "file", "errno": error.errno, "what": what, "file": file}
    return {"kind": "user" if isinstance(error, UserError) else "other", "what": one_line(error)}


def _heard(said: Mapping[str, Any], *, rank: int, path: Path) -> Exception:
    """The error of another process, or this one's own, in words that fit both."""
    if said["kind"] == "file":
        name = Path(said["file"]).name
        where = f" ({name})" if name.startswith("rank-") else ""
        return OSError(said["errno"], f"cannot write it, {said['what']}{where}", str(path))
    if said["kind"] == "user":
        return UserError(said["what"])
    return UnfitEnvironmentError(f"{path}: rank {rank} cannot write its part ({said['what']})")


def _begin(path: Path, temporary: Path, *, is_first: bool) -> None:
    if is_first:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left_by_a_killed_run in (temporary, *path.parent.glob(".*.ckpt*.tmp")):
            if left_by_a_killed_run.is_dir():
                shutil.rmtree(left_by_a_killed_run, ignore_errors=True)
            else:
                left_by_a_killed_run.unlink(missing_ok=True)
        temporary.mkdir()


def _finish(path: Path, temporary: Path, snapshot: Snapshot, *, parts: Mapping[str, str]) -> None:
    content = {
        "format": FORMAT, "version": VERSION, "step": snapshot.step, "run": snapshot.run, "parts": dict(parts),
        "state": snapshot.state,
    }  # fmt: skip
    text = json.dumps({"content": content, "sha256": _checksum(content)}, separators=(",", ":"))
    with (temporary / INDEX_FILE).open("wb") as file:
        file.write(text.encode())
        force(file)
    put_in_place(temporary, path)


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


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
            tensor = part.check_tensor(name)
        if not name.startswith("callbacks/"):
            check_finite([(name, tensor)], source=str(part.file), remedy=_remedy(self.path))

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
    if whole["sha256"] != _checksum(content):
        raise ValueError("its content does not have its checksum")
    return content
