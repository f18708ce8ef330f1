"""``devices``: how many processes a node has, chosen where nobody wrote a number.

    devices=auto       all GPUs that are visible, or the most of them that divide the batch; without a GPU one process
    devices=[0,2]      two processes, on these two of the visible GPUs
    devices=2          two processes

The number is what the run's configuration holds; which GPUs they are is no part of a run. Under another launcher there are
as many as that one started, and a run that goes on has as many as it began with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qvgen.config.processes import launched_world, visible_gpus
from qvgen.errors import UserError

log = logging.getLogger(__name__)

AUTO = "auto"

_unsaid: list[str] = []


@dataclass(frozen=True, kw_only=True)
class DeviceChoice:
    """The processes of a node.

    Attributes:
        number: How many.
        gpus: Which of the visible GPUs they have; None: the first ones.
        line: What was chosen and why, where nobody wrote it; None: it was written.
    """

    number: int
    gpus: tuple[int, ...] | None = None
    line: str | None = None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples and parts that a number of processes has to divide.

    Attributes:
        size: ``batch_size``; 0: what any number of processes divides.
        parts: ``num_nodes``, and ``accumulate`` where that is written.
    """

    size: int
    parts: int = 1

    def most(self, available: int) -> int:
        """The largest number of devices, up to those that are there, that divides the batch.

        Example:
            >>> Batch(size=48).most(7), Batch(size=48, parts=8).most(7), Batch(size=5).most(4)
            (6, 6, 1)
        """
        return max((n for n in range(1, available + 1) if self.size % (n * self.parts) == 0), default=1)


def choose_devices(
    written: Any, *, batch: Callable[[], Batch], began: int | None = None, alone: Callable[[], str | None]
) -> DeviceChoice:
    """How many processes a run has on each node.

    Args:
        written: ``devices`` as it stands in the configuration.
        batch: Says what they have to divide.
        began: Processes of the run that goes on; None: a run that begins.
        alone: Says why it can only be one process; None where it can be several.

    Raises:
        UserError: No number, no list of GPUs, or a list under another launcher.
    """
    if isinstance(written, Sequence) and not isinstance(written, str):
        return DeviceChoice(number=len(written), gpus=_checked_list(written))
    if written != AUTO:
        return DeviceChoice(number=_checked_number(written))
    if (world := launched_world.current()) is not None:
        return DeviceChoice(number=world.local_size)
    if began is not None:
        return _continued(began, batch=batch)
    if (number := visible_gpus.count_gpus()) < 2:
        device = "the GPU that is visible" if number else "the CPU, no GPU is visible"
        return DeviceChoice(number=1, line=f"devices=auto: 1 process on {device}")
    if (why := alone()) is not None:
        return DeviceChoice(number=1, line=f"devices=auto: 1 of {number} GPUs, because {why}")
    divided = batch()
    used = divided.most(number)
    line = f"devices=auto: all {number} GPUs"
    if used < number:
        parts = f" / {divided.parts}" if divided.parts > 1 else ""
        line = f"devices=auto: {used} of {number} GPUs, the most that divide batch_size={divided.size}{parts}"
    return DeviceChoice(number=used, line=line)


def _continued(began: int, *, batch: Callable[[], Batch]) -> DeviceChoice:
    """As many processes as a run began with, or as many as there are GPUs for now."""
    number = visible_gpus.count_gpus()
    if not 0 < number < began:
        return DeviceChoice(number=began, line=f"devices=auto: {began}, as the run began")
    used, divided = batch().most(number), "" if number == 1 else f", the most that divide batch_size={batch().size}"
    line = f"devices=auto: {used}, where the run began with {began}: {visible_gpus.describe_gpus()}{divided}"
    return DeviceChoice(number=used, line=line)


def choose_shares(written: Any, *, is_shard: bool) -> DeviceChoice:
    """How many processes share out a list of items, of any number: all GPUs; a task of another launcher is one by itself.

    Args:
        written: ``devices`` as it stands in the configuration.
        is_shard: The command says which share of the items is this machine's, whoever started it.

    Raises:
        UserError: No number, no list of GPUs, or a number of processes that a launcher has started already.
    """
    world = launched_world.current()
    if world is None:
        return choose_devices(written, batch=lambda: Batch(size=0), alone=lambda: None)
    if not is_shard and written not in (AUTO, 1):
        raise UserError(
            f"devices={written}: {world.launcher} started {world.size} processes, which share out the work; leave it out"
        )
    return DeviceChoice(number=1 if written == AUTO else _checked_number(written))


def _checked_number(written: Any) -> int:
    if isinstance(written, bool) or not isinstance(written, int):
        shown = "null" if written is None else written
        raise UserError(
            f"devices={shown} is neither auto, nor a number of processes as devices=2, nor a list of GPUs as devices=[0,2]"
        )
    if written < 1:
        raise UserError(f"devices={written} must be greater than 0")
    return written


def _checked_list(written: Sequence[Any]) -> tuple[int, ...]:
    numbers = tuple(number for number in written if isinstance(number, int) and not isinstance(number, bool))
    shown = f"devices=[{','.join(map(str, written))}]"
    if not written:
        raise UserError("devices=[] names no GPU; write for example devices=[0,2], or devices=auto for all")
    if len(numbers) < len(written) or min(numbers) < 0:
        raise UserError(f"{shown} is no list of GPUs; write their numbers from 0, as devices=[0,2]")
    if len(set(numbers)) < len(numbers):
        raise UserError(f"{shown} names a GPU twice; each process has one of its own")
    if (world := launched_world.current()) is not None:
        raise UserError(
            f"{shown}: {world.launcher} started the processes, and each has the GPU of its local rank; leave devices out and "
            f"set {visible_gpus.VARIABLE} for all of them"
        )
    return numbers


def check_presence(
    plains: Sequence[Mapping[str, Any]], choices: Sequence[DeviceChoice | None]
) -> tuple[int, ...] | None:
    """The GPUs that all jobs of a command train on here, None: those that are visible.

    Raises:
        UserError: Jobs ask for several lists, or one for more GPUs than there are, where there are any.
    """
    found = {choice.gpus for choice in choices if choice is not None}
    if len(found) > 1:
        raise UserError("the jobs of one command train on the same GPUs; start those with another list by themselves")
    gpus = found.pop() if found else None
    for plain, choice in zip(plains, choices, strict=True):
        if choice is None or gpus is not None or launched_world.current() is not None or plain.get("dry_run"):
            continue
        if choice.number > 1 and 0 < visible_gpus.count_gpus() < choice.number:
            raise UserError(f"devices={choice.number}: {visible_gpus.describe_gpus()}, and each process needs one")
    return gpus


def say_later(line: str | None) -> None:
    """Keep what was chosen for a job until it is known that the job can begin: what is wrong with one is said alone."""
    _unsaid[:] = [] if line is None else [line]


def say_chosen() -> None:
    """Say what was chosen for the job that begins now, once."""
    while _unsaid:
        log.info(_unsaid.pop())
