"""A run's folder: claimed by one process, holding one configuration's run, every file in it whole at any moment.

    run_dir/config.yaml     the configuration, written when the run is claimed
    run_dir/progress.json   {stage: result} of the stages that are done
    run_dir/.lock           held by the process that works there

Files are written beside their place, forced to the disk and renamed, so that a killed process, a full disk or a power
cut leaves the old file or the new one, never half of one.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from qvgen import stop_request
from qvgen.config.run_comparison import as_plain, check_content
from qvgen.config.run_config import CONFIG_FILE
from qvgen.errors import UserError
from qvgen.unfinished import unfinished

log = logging.getLogger(__name__)

PROGRESS_FILE = "progress.json"
LOCK_FILE = ".lock"

_LONGEST_PREFIX = 50
"""Characters of a file's name that its temporary file's name repeats: a name has 255 bytes at most, 4 a character."""


def atomic_write(path: Path, content: bytes | Callable[[Path], object]) -> None:
    """Write a file that is there whole or not at all; the previous one stays until the new one is on the disk.

    Args:
        path: The file; its folder exists.
        content: The bytes, or a function that writes them to the path that it is given (a temporary file in the
            same folder), for example ``lambda temporary: save_file(tensors, temporary)``.

    Raises:
        OSError: The file can't be written; ``path`` is as it was, and nothing is left beside it.
    """
    # A name of its own, which a process number is not: two containers on one disk may have the same.
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:_LONGEST_PREFIX]}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise OSError(error.errno, f"cannot write it, {error.strerror}", str(path)) from error
    os.close(descriptor)
    temporary = Path(name)
    try:
        with unfinished(temporary):
            if callable(content):
                content(temporary)
            else:
                temporary.write_bytes(content)
            temporary.chmod(0o666 & ~_umask())  # safetensors makes files that nobody else can read
            force_to_disk(temporary)
            temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"cannot write it, {error.strerror}", str(path)) from error
        if isinstance(error, RuntimeError) or type(error).__module__.startswith("safetensors"):
            # torch and safetensors report a full disk in their own ways
            raise OSError(f"cannot write {path}: {error}") from error
        raise
    force_to_disk(path.parent)


def set_aside(path: Path) -> Path:
    """Rename a damaged file, so that another can take its place and nothing is lost; returns its new path."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.rename(aside)
    return aside


def _umask() -> int:
    """The process's umask; asking for it means setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def force_to_disk(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_plain(path: Path, plain: Mapping[str, Any]) -> None:
    """Write a plain dict as YAML, atomically; floats come back exactly."""
    atomic_write(path, yaml.safe_dump(as_plain(plain), sort_keys=False).encode())


class RunDirectory:
    """A claimed run folder; a context manager that gives the claim back.

    Attributes:
        path: The folder.
        resumed: Whether it held this run already.
        new_keys: Keys that the version which began the run did not know, or that this one does not know any more.
        world: Key of the processes that share the run out (``MayDiffer.WORLD``) -> values there and here, where they differ.
    """

    def __init__(
        self, path: Path, *, resumed: bool, new_keys: tuple[str, ...], world: Mapping[str, tuple[str, str]], lock: int
    ) -> None:
        self.path = path
        self.resumed = resumed
        self.new_keys = new_keys
        self.world = world
        self._lock = lock

    @classmethod
    def claim(cls, path: Path, plain: Mapping[str, Any], *, resume: bool, force: bool = False) -> Self:
        """Take a folder for a run; it is made if need be, and config.yaml is written to it.

        Args:
            path: The folder: new, empty, or with resume the one of the same run.
            plain: The configuration.
            resume: Continue the run that is there; a folder without one starts from the beginning.
            force: Continue it also where only one of the two configurations has a key, and keep this one from here on.

        Raises:
            UserError: Another process works there, it holds another configuration's run or something else, or
                the same run without ``resume``. Nothing in it is changed then. (With other processes it is
                the same run.)
        """
        path.mkdir(parents=True, exist_ok=True)
        lock = take_lock(path, key="run_dir", value=path)
        try:
            resumed, new_keys, world = check_content(path, as_plain(plain), resume=resume, force=force)
            stop_request.note("in the preparation, nothing is lost")
            stop_request.continue_with({"run_dir": path, "resume": True})
            if not resumed or new_keys or world:
                write_plain(path / CONFIG_FILE, plain)
            for left_by_a_killed_process in list(path.rglob(".*.tmp")):
                if left_by_a_killed_process.is_dir():
                    shutil.rmtree(left_by_a_killed_process, ignore_errors=True)
                else:
                    left_by_a_killed_process.unlink(missing_ok=True)
        except BaseException:
            os.close(lock)
            raise
        if resume and not resumed:
            log.warning("%s holds no run yet; starting from the first step", path)
        return cls(path, resumed=resumed, new_keys=new_keys, world=world, lock=lock)

    def save_stage(self, name: str, result: Mapping[str, Any]) -> None:
        """Record that a stage is done, with its result: what JSON can hold."""
        stages = self._stages()
        stages[name] = dict(result)
        atomic_write(self.path / PROGRESS_FILE, json.dumps(stages, indent=1).encode())

    def load_stage(self, name: str) -> dict[str, Any] | None:
        """The result of a stage that is done, or None."""
        return self._stages().get(name)

    def _stages(self) -> dict[str, dict[str, Any]]:
        """Results by stage; a damaged file is set aside, and its stages count as not done."""
        file = self.path / PROGRESS_FILE
        if not file.exists():
            return {}
        try:
            stages: Any = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            stages = None
        if isinstance(stages, dict) and all(isinstance(result, dict) for result in stages.values()):
            return stages
        aside = set_aside(file)
        log.warning("%s is damaged; it is kept as %s, and the stages that it named are done again", file, aside.name)
        return {}

    def release(self) -> None:
        """Give the claim back; a second call does nothing."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def take_lock(path: Path, *, key: str, value: Path) -> int:
    """Lock a folder; the kernel lifts the lock when this process ends, however it ends.

    A record lock and not flock: a forked child (a data loader's worker) does not inherit it, so one that outlives a
    killed run keeps nobody out.

    Args:
        path: The folder, which is there.
        key: Key of the configuration that names what the folder is for, for messages.
        value: Its value.

    Returns:
        A descriptor; who closes it gives the lock back.

    Raises:
        UserError: Another process holds it.
    """
    descriptor = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(descriptor, 20).decode(errors="replace").strip()
        os.close(descriptor)
        raise UserError(f"{key}={value} is in use by process {holder}; wait for it or choose another") from error
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor
