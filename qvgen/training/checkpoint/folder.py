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

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from qvgen.errors import UnfitEnvironmentError, UserError, one_line
from qvgen.training.checkpoint.exact_json import encode
from qvgen.training.checkpoint.part import Share, check_kept, force, part_name, write_part
from qvgen.training.checkpoint.replaced_folder import put_in_place
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
        checkpoint: Plain values, tensors, and shares of tensors (:class:`~qvgen.training.checkpoint.part.Share`).
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
    text = json.dumps({"content": content, "sha256": content_checksum(content)}, separators=(",", ":"))
    with (temporary / INDEX_FILE).open("wb") as file:
        file.write(text.encode())
        force(file)
    put_in_place(temporary, path)


def content_checksum(content: Any) -> str:
    """SHA-256 of an index's content, as it is written."""
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
