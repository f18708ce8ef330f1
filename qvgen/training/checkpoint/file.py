"""Whether a training checkpoint is what it is said to be, found out before anything is computed from it.

    whole       the CRC-32 of every entry of the zip that torch.save wrote is that of its bytes
    harmless    torch reads it without executing anything (weights_only)
    finite      no NaN and no infinity in weights or moments
    the run's   it holds the mark of the run, and the step that its name says

1 GB takes 0.65 s of one core for the CRCs (several cores share the entries) and 0.15 s for the values, at 2.8 GHz and with
the file in memory; it is mapped and not read. What torch writes between the entries (padding, dates) is covered by no CRC
and decides nothing. A folder that several processes wrote has checksums of its own: checkpoint_folder.py.
"""

from __future__ import annotations

import errno
import os
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning
import torch
from torch import Tensor

from qvgen.errors import UserError
from qvgen.quant.finite import check_finite
from qvgen.run_identity import RunIdentity
from qvgen.training.checkpoint.folder_reader import CheckpointFolder

CHECKPOINT_DIRECTORY = "checkpoints"
"""Where a run's checkpoints lie, in its folder."""

RUN_KEY = "qvgen_run"
"""Entry of a checkpoint that holds the mark of its run, see :mod:`qvgen.run_identity`."""

_PART_BYTES = 1 << 24


def checkpoint_step(path: Path) -> int:
    """The optimizer step that a checkpoint's name says.

    Example:
        >>> checkpoint_step(Path("step-00000050.ckpt"))
        50
    """
    digits = path.stem.removeprefix("step-")
    if not digits.isdecimal():
        raise UserError(f"{path} has no step in its name; give it back its own, as step-00000050.ckpt, or remove it")
    return int(digits)


def check_checkpoint(path: Path, *, run: str | None, only: Collection[str] | None = None) -> dict[str, Any]:
    """Read a checkpoint, mapped to memory, after looking at every byte of it.

    Args:
        path: A file or folder ``step-00000050.ckpt``.
        run: The mark of its run; None where none was recorded.
        only: Entries whose tensors are wanted, for example ``state_dict``: a folder's other tensors are not read.

    Returns:
        Its content: tensors and plain values; a folder's tensors are
        :class:`~qvgen.training.checkpoint.saved_tensor.SavedTensor`, which read what they are asked for.

    Raises:
        UserError: It is damaged, not finite, of another run or of another step; the message says what to do.
    """
    remedy = "delete it to resume from the one before"
    if path.is_dir():
        folder = CheckpointFolder(path)
        _check_which(path, step=folder.step, mark=folder.run, run=run, remedy=remedy)
        folder.check(only=only)
        return folder.state
    try:
        _check_entries(path)
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        step, mark = int(state["global_step"]), state.get(RUN_KEY)
    except OSError as error:
        if isinstance(error, PermissionError | FileNotFoundError | IsADirectoryError) or error.errno == errno.EIO:
            raise UserError(f"{path} can't be read ({error.strerror})") from error
        raise _damaged(path, remedy, error) from error  # a place outside of the file, for example
    except (
        zipfile.BadZipFile, zlib.error, struct.error, UnpicklingError, EOFError, RuntimeError, ValueError, KeyError,
        TypeError, AttributeError, OverflowError,
    ) as error:  # fmt: skip
        raise _damaged(path, remedy, error) from error
    _check_which(path, step=step, mark=mark, run=run, remedy=remedy)
    own = {name: value for name, value in state.items() if name != "callbacks"}  # a best value so far may be infinite
    check_finite(_tensors(own), source=str(path), remedy=remedy)
    return state


def _check_which(path: Path, *, step: int, mark: Any, run: str | None, remedy: str) -> None:
    """Raise UserError for a checkpoint of another step or run."""
    if step != checkpoint_step(path):
        raise UserError(
            f"{path} holds optimizer step {step}, its name says another; give it back its own name or {remedy}"
        )
    if run is not None and mark != run:
        whose = "no run's mark" if mark is None else f"the mark of another run ({str(mark)[:12]}, here {run[:12]})"
        raise UserError(f"{path} holds {whose}; {remedy}")


class RunMark(lightning.Callback):
    """Writes the mark of the run into every checkpoint.

    Args:
        run_dir: The run's folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run = run_key(run_dir)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add it; a run that began without a record has none."""
        del trainer, pl_module
        if self.run is not None:
            checkpoint[RUN_KEY] = self.run


def run_key(run_dir: Path) -> str | None:
    """The mark of a run's checkpoints; None where there is no record."""
    known = RunIdentity.read(run_dir)
    return None if known is None else known.run


def _damaged(path: Path, remedy: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return UserError(f"{path} is no checkpoint or damaged; {remedy} ({reason})")


def _check_entries(path: Path) -> None:
    """Read every entry; raises what zipfile raises where one does not have its CRC."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise zipfile.BadZipFile(f"{entry.filename} is compressed or encrypted, which torch writes nothing as")

        def read(entry: zipfile.ZipInfo) -> None:
            with archive.open(entry) as stream:
                while stream.read(_PART_BYTES):
                    pass

        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(read, entries):
                pass


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested plain values with their places."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _tensors(entry, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from _tensors(entry, f"{name}.{index}")
