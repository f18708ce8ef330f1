"""What the further processes of a command are started with on this machine: a command, a port, and how many there are."""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvgen.config.conf_folder import user_directory
from qvgen.config.leaf_file import foreign_targets
from qvgen.errors import UnfitEnvironmentError


def guard_world_size(actual: int, *, expected: int) -> None:
    """Raise RuntimeError unless as many processes take part as were asked for."""
    if actual != expected:
        raise UnfitEnvironmentError(
            f"{actual} processes take part in the training, but devices={expected} were asked for; "
            "nothing was trained: look for another launcher around this one"
        )


def free_port() -> int:
    """A TCP port of this machine that nobody listens on at the moment."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def worker_command(verb: str, config_file: Path, plain: Mapping[str, Any]) -> list[str]:
    """The command of a verb's worker; ranks are added by WorkerGroup.

    Args:
        verb: The verb.
        config_file: Holds the configuration.
        plain: The configuration, which this process composed: the classes that it names may be followed by the worker.
    """
    folder = user_directory()
    further = [] if folder is None else ["--config-dir", str(folder)]
    further += [word for target in sorted(foreign_targets(plain)) for word in ("--trust", target)]
    return [sys.executable, "-m", "qvgen.cli", "worker", verb, str(config_file), *further]
