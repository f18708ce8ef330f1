"""What processes on several machines need before they train together: a store that all reach, a folder that all see."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from torch.distributed import PrefixStore, Store, TCPStore

from qvgen.config.processes.launched_world import LaunchedWorld
from qvgen.errors import UnfitEnvironmentError, one_line

POLL_SECONDS = 0.2
CONNECT_SECONDS = 900.0
"""How long rank 0 may take to begin: all processes import the same libraries, perhaps from a slow disk."""
FOLDER_SECONDS = 15.0
"""How long a node looks whether a folder is rank 0's before it does without."""
SHARED_SECONDS = 90.0
"""How long a file of rank 0's may take to be seen on another node: NFS remembers folders for a minute."""


def process_name(world: LaunchedWorld) -> str:
    """This process in words."""
    return f"rank {world.rank} on {socket.gethostname()}"


def open_store(world: LaunchedWorld, *, serves: bool = False) -> PrefixStore:
    """A connection to the world's store, for the keys of this start.

    Args:
        world: This process and the others.
        serves: Serve the store, besides.

    Raises:
        RuntimeError: The port is in use, or the server is not reached.
    """
    try:
        store: Store = TCPStore(
            world.address, world.port, is_master=serves, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
    except RuntimeError as error:
        raise UnfitEnvironmentError(
            f"{process_name(world)} can't {'serve' if serves else 'reach'} the store at {world.address}:{world.port} "
            f"({one_line(error)}); set MASTER_ADDR to a name of rank 0's node that the others can reach, and MASTER_PORT to "
            "a free port"
        ) from error
    return PrefixStore(f"qvgen/{world.session}", store)


def wait_for_server(world: LaunchedWorld, *, patience_s: float = CONNECT_SECONDS) -> None:
    """Wait until somebody listens at the store's port; in Python, where a request to stop is noticed.

    Raises:
        RuntimeError: Nobody does, in time.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            socket.create_connection((world.address, world.port), timeout=5.0).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise UnfitEnvironmentError(
                    f"{process_name(world)} does not reach rank 0 at {world.address}:{world.port} ({error}); it has not "
                    "started, or its node can't be reached at that address: set MASTER_ADDR"
                ) from error
            time.sleep(POLL_SECONDS)
        else:
            return


def is_shared(folder: Path, *, like: Path, patience_s: float = FOLDER_SECONDS) -> bool:
    """Whether a folder is the one that rank 0 has marked (:meth:`qvgen.training.distributed.meeting.Meeting.announce`).

    Args:
        folder: The folder; another node may have one of its own in that place.
        like: A file of the run's folder that says what the mark is.
        patience_s: How long it may take to appear.
    """
    mark, deadline = like.read_bytes(), time.monotonic() + patience_s
    while True:
        with suppress(OSError):
            if (folder / like.name).read_bytes() == mark:
                return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS)


def check_shared(file: Path, *, mark: str, me: str, host: str, patience_s: float = SHARED_SECONDS) -> None:
    """Raise UnfitEnvironmentError where a file that rank 0 just wrote is not seen here, or is an earlier start's.

    Args:
        file: The file.
        mark: What rank 0 wrote to it.
        me: This process in words.
        host: Rank 0's host.
        patience_s: How long it may take.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            found = file.read_text(encoding="utf-8")
        except OSError:
            found = ""
        if found == mark:
            return
        if time.monotonic() >= deadline:
            raise UnfitEnvironmentError(
                f"{me} does not see the run that rank 0 on {host} has claimed in run_dir={file.parents[1]}: "
                f"{'it holds an earlier start' if found else f'{file.name} is not there'}; give a run_dir on a disk that all "
                "nodes share"
            )
        time.sleep(POLL_SECONDS)
