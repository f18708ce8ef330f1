"""The other processes of a run, started before this process has imported what it needs to look at the run.

    rank 0   compose, check keys | import, check, claim the folder, log | start | train
    rank 1                       | import, wait                         | help  | train

Importing takes each process seconds. Where the cores are free, both import at the same time; a run that is refused has cost
a process that imported for nothing. What is started ahead is told by its command: the group that the run asks for later is
the one that waits, where both are of the same command, processes and logs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qvgen.config.processes import launched_world
from qvgen.config.processes.device_choice import DeviceChoice
from qvgen.training.distributed.child_command import worker_command
from qvgen.training.distributed.launcher import WorkerGroup

LOG_FOLDER = "logs"
"""In a run's folder: what its other processes said."""

WORKER_FILE = "worker.yaml"
"""In that folder: the configuration, as the other processes read it."""

_waiting: list[WorkerGroup] = []


@contextmanager
def started_ahead(
    verb: str, plains: Sequence[Mapping[str, Any]], choices: Sequence[DeviceChoice | None]
) -> Iterator[None]:
    """While the block runs a verb's jobs, have the other processes of a training import; those that nobody took are ended.

    Args:
        verb: The verb.
        plains: The jobs' configurations. Several jobs start theirs themselves, one after another.
        choices: Which GPUs they take; processes that see but some of them are started when those are chosen.
    """
    sees_all = all(choice is None or choice.gpus is None for choice in choices)
    try:
        if verb == "train" and len(plains) == 1 and sees_all and _has_others(plains[0]):
            plain = plains[0]
            given = {"world_size": plain["devices"], "hang_minutes": plain["training"]["hang_minutes"]}
            group = run_workers(Path(plain["run_dir"]), plain, **given)
            if group.start_ahead():
                _waiting.append(group)
        yield
    finally:
        while _waiting:
            _waiting.pop().end()


def _has_others(plain: Mapping[str, Any]) -> bool:
    """Whether a run of this configuration starts other processes itself, as far as its keys tell."""
    devices = plain["devices"]
    is_plain = launched_world.current() is None and plain["num_nodes"] == 1 and not plain["dry_run"]
    return is_plain and isinstance(devices, int) and devices > 1 and plain["steps"] != 0


def run_workers(
    run_dir: Path, settings: Mapping[str, Any], *, world_size: int, hang_minutes: float | None
) -> WorkerGroup:
    """The processes that a plain start of ``train`` has beside rank 0: those that wait, if they are of this command.

    Args:
        run_dir: The run's folder.
        settings: The run's configuration as plain values.
        world_size: All processes, rank 0 included.
        hang_minutes: See :class:`WorkerGroup`.
    """
    logs = run_dir / LOG_FOLDER
    command = worker_command("train", logs / WORKER_FILE, settings)
    group = WorkerGroup(command, world_size=world_size, log_directory=logs, hang_minutes=hang_minutes)
    same = [place for place, waiting in enumerate(_waiting) if waiting.given == group.given]
    return _waiting.pop(same[0]) if same else group
