"""The held-out error of a model that is being trained, measured by all processes of a run.

    batch        0   1   2   3   4
    rank 0       x           x            each process works on the batches rank, rank + n, ...
    rank 1           x           x
    rank 2               x       .    .   with shares of a model, a batch once more in the place of none

    every rank   its rows of a table: |y - y_teacher|^2 and |y_teacher|^2 of each batch, float64; 0 in the others'
    all          one all-reduce of that table, then the sum of its rows in the order of the batches

A row has one process's numbers and zeros of all others, so that the all-reduce changes no bit, in whatever order it adds: the
error has the bits of one process that works on the same batches. Nobody waits for another one between batches, except inside
of a model that is shared out (fsdp, hsdp): there each forward pass gathers blocks from all processes, all of which call it
equally often. What a process computes in the place of a batch that is not there is dropped.

The reference is what rank 0's full-precision model gave for each batch. Where no process holds that model whole, each process
computes the reference of its own batches, once, with the shares that take part in training.

At the end of a run the outputs themselves are wanted, of a trained model that is still shared out: each process computes
those of its batches in the same way, and one gathering behind the loop brings them to rank 0 (:class:`SharedOutputs`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, distributed, nn

from qvgen.data.sealed_tensors import write_sealed
from qvgen.evaluation.distance import RelativeError, squares
from qvgen.evaluation.held_out import MeasuredInputs
from qvgen.stop_request import Stopped
from qvgen.training.stop_point import agreed

log = logging.getLogger(__name__)

REFERENCE_FILE = "held_out.safetensors"
"""In the run's folder while several processes train: the full-precision model's outputs, batch by batch."""


class SharedError:
    """A model -> its relative error on held-out inputs, in all processes; a collective.

    Args:
        inputs: The inputs, the same in all processes.
        reference: Number of a batch -> the full-precision model's output for it, float32; None: :meth:`take_reference_of`
            comes before the first call.
        together: A call is the work of several processes, all of which call alike.
        context: Processes that share a sample's tokens out: ranks that follow each other, with the same batches.
    """

    def __init__(
        self, inputs: MeasuredInputs, *, reference: Callable[[int], Tensor] | None, together: bool, context: int = 1
    ) -> None:
        self._inputs, self._reference, self._together, self._context = inputs, reference, together, context
        self._teacher: tuple[nn.Module, ...] = ()

    def take_reference_of(self, teacher: nn.Module) -> None:
        """Have the first call compute the reference of this process's batches, where none was given, with a shared model."""
        self._teacher = (teacher,)

    def __call__(self, model: nn.Module) -> float:
        """Measure.

        Raises:
            Stopped: In all processes, where any was asked to stop.
        """
        if self._reference is None:  # before the model is called: a process without a batch takes part in this, too
            (teacher,) = self._teacher
            self._reference = dict(self._outputs(teacher)).__getitem__
        table, is_stopped = torch.zeros(self._inputs.num_batches, 2, dtype=torch.float64), False
        try:
            for number, predicted in self._outputs(model):
                if distributed.get_rank() % self._context == 0:  # the others of its group have the same
                    table[number] = squares(predicted, self._reference(number))
        except Stopped:
            if self._together:  # all have left at the same call
                raise
            is_stopped = True
        if any(agreed(is_stopped, together=True)):
            raise Stopped
        error = RelativeError()
        for row in _added_up(table):
            error.add(row)
        return error.compute()

    def _outputs(self, model: nn.Module) -> Iterator[tuple[int, Tensor]]:
        return _own_outputs(self._inputs, model, together=self._together, context=self._context)


class SharedOutputs:
    """The outputs of a model that is shared out, for held-out inputs: all processes compute them, rank 0 gets them.

    Args:
        inputs: The inputs, the same in all processes.

    Attributes:
        found: As rank 0, once they are computed: the outputs, float32, batch by batch; None before, and in the others.
    """

    def __init__(self, inputs: MeasuredInputs) -> None:
        self._inputs = inputs
        self.found: tuple[Tensor, ...] | None = None

    def compute(self, model: nn.Module) -> None:
        """Compute them; a collective.

        Raises:
            Stopped: In all processes, where any was asked to stop.
        """
        own = dict(_own_outputs(self._inputs, model, together=True))
        log.info("outputs of the trained model: batches %s of the held-out inputs", ", ".join(map(str, own)) or "none")
        parts: list[dict[int, Tensor]] | None = None
        if distributed.get_rank() == 0:
            parts = [{} for _ in range(distributed.get_world_size())]
        distributed.gather_object(own, parts, dst=0)
        if parts is not None:
            numbered = dict(chain.from_iterable(part.items() for part in parts))
            self.found = tuple(numbered[number] for number in range(self._inputs.num_batches))


def _own_outputs(
    inputs: MeasuredInputs, model: nn.Module, *, together: bool, context: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """The numbers of this process's batches, each with a model's output; what it computes besides is dropped."""
    count, groups = inputs.num_batches, distributed.get_world_size() // context
    own = range(distributed.get_rank() // context, count, groups)
    rounds = -(-count // groups) if together else len(own)
    numbers = [*own, *[0] * (rounds - len(own))]
    for index, predicted in enumerate(inputs.predictions(model, numbers)):
        if index < len(own):
            yield numbers[index], predicted


def _added_up(table: Tensor) -> Tensor:
    """The sum of a table over all processes, on the CPU."""
    summed = table.to("cuda" if distributed.get_backend() == "nccl" else "cpu")
    distributed.all_reduce(summed, op=distributed.ReduceOp.SUM)
    return summed.cpu()


def write_reference(run_dir: Path, reference: Sequence[Tensor], *, key: str) -> None:
    """As rank 0, before the others train: write the full-precision model's outputs for them.

    Args:
        run_dir: The run's folder.
        reference: The outputs, batch by batch.
        key: What they were made from.
    """
    write_sealed(run_dir / REFERENCE_FILE, {str(number): value for number, value in enumerate(reference)}, key=key)


def read_reference(run_dir: Path) -> Callable[[int], Tensor]:
    """The outputs that rank 0 wrote, each read when it is asked for."""

    def read(number: int) -> Tensor:
        with safe_open(run_dir / REFERENCE_FILE, framework="pt") as file:
            value: Tensor = file.get_tensor(str(number))
        return value

    return read
