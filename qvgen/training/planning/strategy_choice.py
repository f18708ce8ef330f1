"""``strategy=auto``: the first strategy whose plan fits, in the order of what it sends over the network.

single     one process
ddp        where every device holds everything; on a CPU always, whose processes share one memory anyway
hsdp       several nodes, and the devices of one hold a whole: blocks are gathered inside a node
fsdp       else; where it does not fit either, nothing does
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qvgen.config.schema.memory_rules import refused_sharding
from qvgen.config.schema.strategy import StrategyConfig
from qvgen.training.design.meta_model import Prepared, build_student
from qvgen.training.design.training_run import TrainingRun
from qvgen.training.loss.prediction_loss import freeze_the_rest_
from qvgen.training.planning.memory import GIB, USABLE_SHARE, Device, MemoryCounter
from qvgen.training.planning.training_plan import step_settings


@dataclass(frozen=True, kw_only=True)
class StrategyChoice:
    """What was chosen.

    Attributes:
        strategy: With its name in place of ``auto``.
        line: Which, and why, for people.
        fits: Whether a device can hold it; True where nothing was counted.
        counter: What was counted, for the plan; None: nothing.
    """

    strategy: StrategyConfig
    line: str
    fits: bool = True
    counter: MemoryCounter | None = None


def choose_strategy(run: TrainingRun, device: Device, *, student: Prepared | None = None) -> StrategyChoice:
    """Choose for a run whose strategy is ``auto``; reads no weights.

    Args:
        run: What is to be trained.
        device: What trains.
        student: Of :func:`qvgen.training.start.student_check.check_student`; None: it is built.
    """
    if run.devices == 1:
        return StrategyChoice(strategy=named(run.strategy, "single"), line="strategy=auto: single, one process")
    ddp = named(run.strategy, "ddp")
    if not device.on_gpu:
        return StrategyChoice(
            strategy=ddp, line=f"strategy=auto: ddp, the {run.devices} processes share a CPU's memory"
        )
    prepared, _ = student or build_student(run.model.rebuild(), run.design, is_planned=True)
    freeze_the_rest_(prepared, method=run.design.method, optim=run.steps.optim)
    counter, settings, found = MemoryCounter(run, prepared), step_settings(run, device), []
    for strategy in _candidates(run):
        shards = replace(run, strategy=strategy).shards
        nbytes = counter.total(settings, shards=shards)
        found.append((strategy, shards, nbytes))
        if nbytes <= device.usable_bytes:
            break
    (chosen, _, nbytes), fits = found[-1], found[-1][2] <= device.usable_bytes
    if not fits:  # the least of those that can be had
        chosen, _, nbytes = min(found, key=lambda entry: entry[2])
    room = f"{_gib(device.usable_bytes)} ({USABLE_SHARE:.0%} of {_gib(device.nbytes)}) of each device"
    larger = [f"{strategy.name} needs {_gib(size)}" for strategy, _, size in found if strategy is not chosen]
    if fits:
        line = f"strategy=auto: {chosen.name}, {_gib(nbytes)} of {room}"
        line += f"; {', '.join(larger)}" if larger else ""
    else:
        line = f"strategy=auto: nothing fits, {chosen.name} needs {_gib(nbytes)} and has {room}"
        line += f"; {', '.join(larger)}" if larger else ""
    if refusal := refused_sharding(optim=run.steps.optim, strategy=named(run.strategy, "fsdp")):
        line += "" if fits else f"; {refusal}"
    return StrategyChoice(strategy=chosen, line=line, fits=fits, counter=counter)


def named(strategy: StrategyConfig, name: str) -> StrategyConfig:
    """A strategy in place of ``auto``, with its other options."""
    return replace(strategy, name=name)  # type: ignore[arg-type]  # one of the names


def _candidates(run: TrainingRun) -> Iterator[StrategyConfig]:
    """Strategies that the run's options allow, in the order in which they are preferred."""
    yield named(run.strategy, "ddp")
    if refused_sharding(optim=run.steps.optim, strategy=named(run.strategy, "fsdp")) is None:
        if run.num_nodes > 1 and run.devices > run.num_nodes:
            yield named(run.strategy, "hsdp")
        yield named(run.strategy, "fsdp")


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB"
