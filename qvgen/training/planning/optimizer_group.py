"""The groups of a run's optimizer, as its plan shows them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from qvgen.training.design.training_run import TrainingRun


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """One group of the optimizer."""

    name: str
    tensors: int
    parameters: int
    learning_rate: float
    weight_decay: float


def planned_groups(run: TrainingRun, student: nn.Module) -> list[ParameterGroup]:
    """All of them; the student may be on the meta device."""
    return [
        ParameterGroup(
            name=group["name"],
            tensors=len(group["params"]),
            parameters=sum(parameter.numel() for parameter in group["params"]),
            learning_rate=group["lr"],
            weight_decay=group["weight_decay"],
        )
        for group in run.design.method.parameter_groups(student, run.steps.optim)
    ]
