"""How a step's batch is shared out over processes and cut into micro-batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STEP_PARTS = 2
"""A step's batch is computed in at least so many parts, whose gradients are added. One process that goes through two
parts adds the same two numbers as two processes with one part each, so that both train the same bits; a batch in one
piece would differ in the last bit of its sums, and a code that flips for it changes the loss by a few per cent after
ten steps."""


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """The samples of an optimizer step.

    Attributes:
        size: Samples per step, over all devices and micro-batches; a multiple of ``groups`` x ``accumulate``.
        accumulate: Micro-batches of each device per step that were asked for.
        devices: Processes.
        context: Processes that share a sample's tokens out, and have the same samples; they divide ``devices``.

    Example:
        >>> StepBatch(size=8).num_micro_batches, StepBatch(size=8, devices=4).micro_batch_size
        (2, 2)
    """

    size: int
    accumulate: int = 1
    devices: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        if self.devices % self.context:
            raise ValueError(f"groups of {self.context} do not divide {self.devices} devices")
        if min(self.size, self.accumulate, self.devices) < 1 or self.size % (self.accumulate * self.groups):
            raise ValueError(
                f"a batch of {self.size} can't be divided by {self.groups} devices x {self.accumulate} micro-batches; use a "
                "multiple of their product"
            )

    @property
    def groups(self) -> int:
        """Processes, or groups of them, that have samples of their own."""
        return self.devices // self.context

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per step of each process: ``accumulate``, or more where :data:`STEP_PARTS` asks for it."""
        if self.accumulate * self.groups < STEP_PARTS and self.size % STEP_PARTS == 0:
            return STEP_PARTS
        return self.accumulate

    @property
    def micro_batch_size(self) -> int:
        """Samples that a process works on at once."""
        return self.size // (self.num_micro_batches * self.groups)


def count_micro_batches_(checkpoint: dict[str, Any], *, per_step: int) -> None:
    """Give Lightning's progress in a checkpoint the counts of a run whose steps all had as many micro-batches as now.

    A run that goes on with more processes may go through fewer micro-batches in each of them. Lightning steps the optimizer
    after every ``per_step``-th one that it has counted since training began.

    Args:
        checkpoint: As Lightning has it, written after a whole step.
        per_step: Micro-batches of each process per step.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    steps = int(checkpoint["global_step"])
    for counts in (progress["total"], progress["current"]):
        behind = {name: counts["ready"] - count for name, count in counts.items()}  # the last one is not completed yet
        if counts["ready"]:
            counts.update({name: steps * per_step - behind[name] for name in counts})
