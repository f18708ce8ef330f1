"""A training: what is trained, on which data, in how many steps, by how many processes; and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from qvgen.config.schema.ema import NO_AVERAGE, EmaConfig
from qvgen.config.schema.sections import CheckpointConfig, EvaluationConfig
from qvgen.config.schema.strategy import StrategyConfig
from qvgen.config.schema.trainer import TrainerConfig
from qvgen.data.source import DataSource
from qvgen.methods.base import Method
from qvgen.models.named_family import NamedFamily
from qvgen.training.design.student import StudentDesign
from qvgen.training.design.training_steps import TrainingSteps

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.loggers import Logger

    from qvgen.training.shared_error import SharedOutputs


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A training; the same in each of its processes.

    Attributes:
        model: The model. A plan rebuilds it for every size of clips that it tries.
        design: The student's layers, and the method that trains them.
        steps: The optimizer steps.
        strategy: How processes share the work; ``auto`` as ``single`` or ``ddp``, unless a plan has chosen another
            (:func:`qvgen.training.planning.strategy_choice.choose_strategy`).
        num_nodes: Machines, each with as many of the processes.
        ema: The average of the student; none by default.
        data: The data. None, for a plan alone: clips of the model's own size, without a cache.
    """

    model: NamedFamily
    design: StudentDesign
    steps: TrainingSteps
    strategy: StrategyConfig
    ema: EmaConfig = NO_AVERAGE
    data: DataSource | None = None
    num_nodes: int = 1

    def __post_init__(self) -> None:
        assert self.devices % self.num_nodes == 0, f"{self.devices} processes on {self.num_nodes} nodes"
        assert self.shards  # a ValueError says why there is no such group

    @property
    def devices(self) -> int:
        """Processes."""
        return self.steps.batch.devices

    @property
    def node_devices(self) -> int:
        """Processes of each machine."""
        return self.devices // self.num_nodes

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are shared out over the devices; else every device holds all of them."""
        return self.shards > 1

    @property
    def calls_together(self) -> bool:
        """Whether a call of a model is the work of several processes, so that all call it alike."""
        return self.is_sharded or self.strategy.context_parallel > 1

    @property
    def shares_outputs(self) -> bool:
        """Whether all processes compute the outputs of the trained student while they share it out.

        A method that changes layers behind the last step (:meth:`qvgen.methods.base.Method.finish_`) changes whole ones.
        """
        is_trained = type(self.design.method).finish_ is Method.finish_
        return self.is_sharded and is_trained and not self.strategy.low_host_memory

    @property
    def shards(self) -> int:
        """Over how many devices parameters are shared out; 1: every device holds all of them."""
        return self.strategy.shards(devices=self.node_devices, nodes=self.num_nodes)


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingOutput:
    """What a training saves, measures and shows while it goes on.

    Attributes:
        run_dir: The run's claimed folder.
        checkpoint: How often the run's state is saved.
        evaluation: How often it is measured, and the validation videos.
        trainer: Options of Lightning's Trainer.
        validate: Measures the held-out relative error of the student, in all processes; None: it is not measured.
        outputs: Gets the outputs of the trained student from all processes, while it is shared out; None: nobody wants them.
        loggers: Where metrics go besides metrics.csv.
        callbacks: Lightning callbacks of the user's, which all processes have.
    """

    run_dir: Path
    checkpoint: CheckpointConfig
    evaluation: EvaluationConfig
    trainer: TrainerConfig
    validate: Callable[[nn.Module], float] | None = None
    outputs: SharedOutputs | None = None
    loggers: Sequence[Logger] = ()
    callbacks: Sequence[Callback] = ()
