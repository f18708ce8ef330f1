"""A command that another launcher started several times, as one training: rank 0 does it, the others take part in it.

What rank 0 does is what a plain start does. The others compose the same command, for its errors and for the classes that it
may name, and train with the configuration that rank 0 wrote to the run's folder.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qvgen import stop_request
from qvgen.config.build import build
from qvgen.config.leaf_file import foreign_targets
from qvgen.config.processes.launched_world import LaunchedWorld
from qvgen.config.run_config import read_plain
from qvgen.errors import UnfitEnvironmentError, one_line
from qvgen.training.distributed.meeting import SAMPLE, START, Meeting, RankZeroEndedError, current
from qvgen.training.distributed.plain_group import COLLECTIVE_TIMEOUT
from qvgen.training.distributed.silence import BAD_ENVIRONMENT
from qvgen.training.whole_run import WORKER_FILE
from qvgen.verbs import import_verb

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 20.0
"""How long a process that was stopped, or failed, waits for rank 0 to say how it ended: that has ten seconds to notice."""
_BUG = 1


def lead(world: LaunchedWorld, run: Callable[[], int]) -> int:
    """Run a command as rank 0; ``run`` says what is wrong, and returns its exit code."""
    with Meeting(world) as meeting:
        code = _BUG
        try:
            code = run()
        finally:
            meeting.end(code)
        return code


def follow(world: LaunchedWorld, run: Callable[[], int]) -> int:
    """Run a command as another rank: ``run`` takes part in rank 0's training.

    Returns:
        The exit code; rank 0's, where it failed or was stopped.

    Raises:
        UnfitEnvironmentError: What went wrong here while rank 0 goes on, or that rank 0 ended before training.
    """
    stop_request.be_silent()
    with Meeting(world) as meeting:
        try:
            try:
                return run()
            except RankZeroEndedError:
                raise
            except stop_request.Stopped:
                code = meeting.verdict(timeout_s=PATIENCE_SECONDS)
                if code is None:
                    print(f"qvgen: {meeting.me} was stopped, and rank 0 did not end: see its output", file=sys.stderr)
                    return stop_request.say_end()
                return code
            except Exception as error:
                return _after_failure(meeting, error)
        except RankZeroEndedError as end:
            if end.code == BAD_ENVIRONMENT:
                raise UnfitEnvironmentError(str(end)) from end
            return end.code
        finally:
            meeting.leave()


def _after_failure(meeting: Meeting, error: Exception) -> int:
    """Tell rank 0 what went wrong here, at once; it says so, unless the same went wrong there.

    Returns:
        Rank 0's exit code.

    Raises:
        UnfitEnvironmentError: Rank 0 does not end, so that it is said here.
        Exception: The error, where it is a bug that is not rank 0's, too: somebody needs its traceback.
    """
    words = one_line(error)
    said = words if words.startswith(meeting.me) else f"{meeting.me} failed: {words}"
    meeting.fail(said)
    is_bug = not isinstance(error, ValueError | OSError | UnfitEnvironmentError)
    log.log(logging.ERROR if logging.root.handlers else logging.DEBUG, "%s", meeting.me, exc_info=error)
    try:
        code = meeting.verdict(timeout_s=PATIENCE_SECONDS)
    except RankZeroEndedError:  # without a word, so that it is said here
        code = None
    if is_bug and code != _BUG:
        raise error
    if not code:
        raise UnfitEnvironmentError(said) from error
    return code


def take_part(verb: str, plain: Mapping[str, Any]) -> int:
    """Train as another rank than 0; returns an exit code.

    Args:
        verb: The verb.
        plain: The configuration that this process composed.
    """
    meeting = current()
    assert meeting is not None, "follow() has entered it"
    if plain.get("dry_run"):  # rank 0 says the plan
        return meeting.verdict(timeout_s=float("inf")) or 0
    world, module = meeting.world, import_verb(verb)
    module.look_ahead(
        build(verb, plain)
    )  # rank 0 may make its start for hours before this process is asked for anything

    @cache
    def config(folder: Path) -> Any:
        _log_to(folder / "logs" / f"rank{world.rank}.log")
        return build(verb, read_plain(folder / "logs" / WORKER_FILE), trusted=foreign_targets(plain))

    helps = {
        SAMPLE: lambda folder: module.help_calibration(config(folder), rank=world.rank),
        START: lambda folder: module.help_start(config(folder), rank=world.rank),
    }
    folder = meeting.wait_for_run(helps=helps)
    given = config(folder)
    options = {"hang_minutes": given.training.hang_minutes, "shares_on_host": given.strategy.cpu_offload}
    with meeting.group(timeout=COLLECTIVE_TIMEOUT, **options):
        module.run_worker(given, rank=world.rank, world_size=world.size, port=world.port)
    return 0


def check_devices(world: LaunchedWorld) -> None:
    """Raise UnfitEnvironmentError where a process does not see its GPU: that of its local rank, of all that its node has."""
    seen = torch.cuda.device_count() if torch.cuda.is_available() else world.local_size
    if seen < world.local_size:
        raise UnfitEnvironmentError(
            f"rank {world.rank} on {socket.gethostname()} sees {seen} GPUs (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', '')}), and {world.launcher} started {world.local_size} processes on "
            "each node, of which each takes the one of its local rank; let all see all: srun --gpus-per-node=N and neither "
            "--gpus-per-task nor --gpu-bind"
        )


def _log_to(file: Any) -> None:
    """Write what this rank logs to the run's folder, with time and host; rank 0 alone speaks on the terminal."""
    handler = logging.FileHandler(file, mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter(f"%(asctime)s {socket.gethostname()} %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
