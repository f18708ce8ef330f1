"""A whole training as rank 0 leads it: its own share, and the processes that share it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from qvgen.config.processes import launched_world
from qvgen.evaluation.held_out import MeasuredInputs
from qvgen.run_directory import write_plain
from qvgen.training.checkpoint.file import CHECKPOINT_DIRECTORY, check_checkpoint, run_key
from qvgen.training.checkpoint_writer import checkpoints
from qvgen.training.design.training_run import TrainingOutput, TrainingRun
from qvgen.training.distributed import heartbeat
from qvgen.training.distributed.ahead import LOG_FOLDER, WORKER_FILE, run_workers
from qvgen.training.distributed.launcher import WorkerGroup
from qvgen.training.distributed.meeting import SAMPLE, START
from qvgen.training.distributed.meeting import current as current_meeting
from qvgen.training.distributed.plain_group import COLLECTIVE_TIMEOUT
from qvgen.training.distributed.store_exchange import default_store
from qvgen.training.distributed.store_queue import StoreQueue
from qvgen.training.session import train_share
from qvgen.training.shared_error import SharedOutputs
from qvgen.training.start.shared import StartHelpers
from qvgen.training.trainer import Processes


@contextmanager
def trained(
    run: TrainingRun,
    output: TrainingOutput,
    *,
    student: nn.Module | None,
    teacher: nn.Module | None,
    settings: Mapping[str, Any],
    hang_minutes: float | None = None,
    workers: WorkerGroup | None = None,
) -> Iterator[int]:
    """Train as rank 0, with as many other processes as the run has, which are there until the block ends.

    Args:
        run: What is trained.
        output: What it leaves behind.
        student: Holds the state that training starts from; holds the trained state afterwards. None: no process has a
            whole student, and the trained state is that of the newest checkpoint.
        teacher: Full-precision model, if there is one: the method's target, and what validation videos stand beside.
        settings: The run's configuration as plain values, all of it: what the other processes read.
        hang_minutes: The run ends after so long in which no process reported anything; None: never.
        workers: The other processes, where :func:`early_workers` started them.

    Yields:
        The optimizer step that training ended with: the last one, or where a callback ended it.

    Raises:
        UserError: The newest checkpoint is damaged, not finite or of another run.
    """
    run_dir = output.run_dir
    if found := checkpoints(run_dir / CHECKPOINT_DIRECTORY):  # once, for all processes
        check_checkpoint(found[-1], run=run_key(run_dir))
    share = partial(train_share, run, output, student=student, teacher=teacher)
    if run.devices == 1:
        yield share()
        return
    if (meeting := current_meeting()) is not None:  # another launcher started the others, and looks after them
        _write_settings(run_dir, settings)
        meeting.announce(run_dir)
        on_host = run.strategy.cpu_offload
        with meeting.group(timeout=COLLECTIVE_TIMEOUT, hang_minutes=hang_minutes, shares_on_host=on_host):
            yield _at_the_end(share(processes=processes_of(run, rank=0, port=meeting.world.port)))
        return
    with workers or _worker_group(run, run_dir, settings=settings, hang_minutes=hang_minutes) as group:
        yield _at_the_end(share(processes=processes_of(run, rank=0, port=group.port)))


def _at_the_end(step: int) -> int:
    """Say that training is over: what follows takes as long as it takes."""
    heartbeat.report(heartbeat.DELIVERING)
    return step


def sharing_queue(run: TrainingRun) -> StoreQueue | None:
    """What the run's processes share out by when training is over; None: rank 0 does it alone."""
    if run.devices == 1 or not run.steps.num_steps:
        return None
    return StoreQueue(default_store(), num_processes=run.devices)


def shared_outputs(run: TrainingRun, inputs: MeasuredInputs) -> SharedOutputs | None:
    """What gets the outputs of a trained student while it is shared out; None: whoever has it whole computes them."""
    return SharedOutputs(inputs) if run.shares_outputs else None


@contextmanager
def early_workers(
    run: TrainingRun, run_dir: Path, *, settings: Mapping[str, Any], hang_minutes: float | None
) -> Iterator[WorkerGroup | None]:
    """Start a run's other processes before rank 0 has its start: they import meanwhile, and wait.

    Without training they take part in the start alone, and are ended behind the block.

    Yields:
        What :func:`trained` takes as ``workers``; None where there are no others, or another launcher started them.
    """
    if run.devices == 1 or current_meeting() is not None:
        yield None
        return
    group = _worker_group(run, run_dir, settings=settings, hang_minutes=hang_minutes)
    try:
        group.start()
        yield group
    finally:
        group.end()


def start_helpers(
    run: TrainingRun, run_dir: Path, *, settings: Mapping[str, Any], workers: WorkerGroup | None
) -> StartHelpers | None:
    """The processes that take part in a run's start; None where rank 0 makes it by itself.

    Args:
        run: What is trained.
        run_dir: Its folder.
        settings: See :func:`trained`.
        workers: The other processes, where :func:`early_workers` started them.
    """
    sizes = {"world_size": run.devices, "neighbours": run.node_devices}
    if workers is not None:
        asked = {"ask": workers.ask, "check": workers.check, "ask_calibration": workers.ask_calibration}
        return StartHelpers(**sizes, run_dir=run_dir, **asked)
    if (meeting := current_meeting()) is None or run.devices == 1:
        return None

    def ask(what: str, *, marked: Path | None = None) -> None:
        _write_settings(run_dir, settings)
        meeting.announce(run_dir, asks=what, marked=marked)

    cache = Path(settings["calibration"]["cache"]).expanduser()
    asked = {"ask": partial(ask, START), "ask_calibration": partial(ask, SAMPLE, marked=cache)}
    return StartHelpers(**sizes, run_dir=run_dir, check=meeting.start_watch().check, **asked)


def _worker_group(
    run: TrainingRun, run_dir: Path, *, settings: Mapping[str, Any], hang_minutes: float | None
) -> WorkerGroup:
    """The processes that a plain start has beside rank 0."""
    _write_settings(run_dir, settings)
    return run_workers(run_dir, settings, world_size=run.devices, hang_minutes=hang_minutes)


def _write_settings(run_dir: Path, settings: Mapping[str, Any]) -> None:
    """Write the configuration for the other processes."""
    logs = run_dir / LOG_FOLDER
    logs.mkdir(exist_ok=True)
    write_plain(logs / WORKER_FILE, {**settings, "run_dir": str(run_dir)})


def processes_of(run: TrainingRun, *, rank: int, port: int) -> Processes:
    """A run's processes, as one of them sees them."""
    zero = run.strategy.name == "deepspeed"
    world = launched_world.current()
    return Processes(rank=rank, world_size=run.devices, port=port, shards=run.shards, launched=world, zero=zero)
