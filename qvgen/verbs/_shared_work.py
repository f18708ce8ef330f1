"""What the processes of a run share out besides its steps, in a line of its plan; docs/distributed.md has the whole table."""

from __future__ import annotations

from qvgen.config.schema.train import TrainConfig
from qvgen.training.design.training_run import TrainingRun
from qvgen.verbs._parts import sampled_needs


def shared_work(config: TrainConfig, run: TrainingRun) -> list[str]:
    """The line; none where a process is alone, or nothing is quantized."""
    if run.devices == 1 or not config.method.quantizes:
        return []
    shared, alone = [], []
    if sampled_needs(config):
        where = " (nodes that see rank 0's calibration.cache)" if run.num_nodes > 1 else ""
        shared.append(f"the calibration{where}")
    if (every := config.evaluation.every_steps) is not None:
        shared.append(f"held-out errors every {every} steps")
    if not config.strategy.low_host_memory:  # which ends with a checkpoint
        alone.append("errors of the start")
        if run.is_sharded:  # rank 0 puts the trained model together
            (shared if run.shares_outputs else alone).append("held-out errors of the end")
            shared.append("videos of the full-precision and the packed model")
            alone.append("videos of the trained model and of its start")
        else:
            shared.append("held-out errors and videos of the end")
    parts = [(f"shared out over {run.devices} processes", shared), ("rank 0 alone", alone)]
    line = "; ".join(f"{who}: {', '.join(work)}" for who, work in parts if work)
    return [line] if line else []
