"""What the trainings of this folder share: the clipped step of an optimizer with its schedule, and what is kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning
import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from qvgen.config.schema.sections import OptimConfig
from qvgen.lowrank.sharded import shard_group
from qvgen.methods.parameter_group import parameter_groups
from qvgen.quant.precision import has_float64
from qvgen.training.optim.optimizer import build_optimizer

NORM_GROUPS = ("weights", "phi")
"""Groups of the optimizer whose gradients have a norm of their own, so that runs with and without Phi can be compared."""


class TrainingDivergedError(ValueError):
    """The loss or the gradients are no longer finite."""


class OptimizerModule(lightning.LightningModule):
    """A LightningModule that trains one network.

    Args:
        optim: Optimizer and schedule.
        num_steps: Optimizer steps of the whole run.
        seed: Of the run.

    Attributes:
        step_losses: Of the micro-batches since the last optimizer step.
        gradient_norm: Of all gradients before clipping, in the last step.
        group_norms: The same of the gradients of each of the optimizer's groups in :data:`NORM_GROUPS` that there are.
        learning_rate: Of the last step.
        clips: Whether gradients are clipped here; False where the strategy clips, and says their norm by :meth:`take_norm`.
    """

    def __init__(self, *, optim: OptimConfig, num_steps: int, seed: int) -> None:
        super().__init__()
        self.optim, self.num_steps, self.seed = optim, num_steps, seed
        self.step_losses: list[Tensor] = []
        self.gradient_norm: Tensor | None = None
        self.group_norms: dict[str, Tensor] = {}
        self.learning_rate = 0.0
        self.clips = True

    def is_measured(self, step: int) -> bool:
        """Whether a measurement follows an optimizer step, so that its row, checkpoint and videos come after that."""
        del step
        return False

    @property
    def trained(self) -> nn.Module:
        """The network, a submodule of this one."""
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer trains, at which peak rates; see :mod:`qvgen.methods.parameter_group`."""
        return parameter_groups(self.trained, self.optim)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip all gradients, by their norm or each entry; keep the norm before (the paper's regret bound) and the rate."""
        del gradient_clip_val
        self.learning_rate = float(optimizer.param_groups[0]["lr"])
        if not self.clips:
            return
        trained = [parameter for parameter in self.trained.parameters() if parameter.grad is not None]
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        places = {id(parameter): place for place, parameter in enumerate(trained)}
        parts = {
            group["name"]: [places[id(parameter)] for parameter in group["params"] if id(parameter) in places]
            for group in optimizer.param_groups
            if group.get("name") in NORM_GROUPS
        }
        self.gradient_norm, *norms = gradient_norms(gradients, list(parts.values()))
        self.group_norms = dict(zip(parts, norms, strict=True))
        self._check_finite()
        by_value, limit = gradient_clip_algorithm == "value", self.optim.gradient_clip
        if limit is None:
            return
        factor = (limit / (self.gradient_norm + 1e-6)).clamp(max=1.0)
        local = [_local(gradient) for gradient in gradients]
        if by_value:
            for gradient in local:
                gradient.clamp_(-limit, limit)
        else:
            torch._foreach_mul_(local, factor)

    def take_norm(self, norm: Tensor) -> None:
        """Take the norm of all gradients before clipping from who has them, behind a step.

        Raises:
            TrainingDivergedError: It, or a loss of the step, is not finite: before any checkpoint has the step.
        """
        self.gradient_norm = norm.to(self.device)
        self._check_finite()

    @property
    def norms(self) -> dict[str, Tensor]:
        """All norms of the last step, as metrics name them."""
        assert self.gradient_norm is not None
        groups = {f"train/gradient_norm_{name}": norm for name, norm in self.group_norms.items()}
        return {"train/gradient_norm": self.gradient_norm, **groups}

    def _check_finite(self) -> None:
        """Raise TrainingDivergedError before a step with a loss or a gradient that is not finite: its one wait for a GPU."""
        assert self.gradient_norm is not None
        losses = [loss.flatten() for loss in self.step_losses]
        norm = self.gradient_norm.reshape(1)
        norm = norm.to(losses[0].device) if losses else norm  # gradients may lie on the host
        if torch.isfinite(torch.cat([norm, *losses])).all():
            return
        for loss in losses:
            if not torch.isfinite(loss).all():
                raise TrainingDivergedError(
                    f"the loss is {loss[0].item()} in optimizer step {self.global_step}; the last checkpoint is kept: lower "
                    "optim.learning_rate, or resume from it after correcting the data"
                )
        raise TrainingDivergedError(
            f"the gradient norm is {self.gradient_norm.item()} in optimizer step {self.global_step}; the last "
            "checkpoint is kept: lower optim.learning_rate"
        )

    def configure_optimizers(self) -> Any:
        """AdamW, stepped with its schedule once per optimizer step."""
        optimizer, schedule = build_optimizer(
            self.parameter_groups(), self.optim, num_steps=self.num_steps, seed=self.seed
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def gradient_norms(gradients: Sequence[Tensor], parts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Euclidean norms, float32 [] each: of all gradients together, then of those at each part's places; one collective.

    Summed in float64: the result has the same bits however the gradients are cut into shares, so that a sharded run clips as
    one process does. (A float32 norm differs in its last bit, and codes that flip for it change a loss by a few per cent
    after ten steps.)
    """
    dtype = torch.float64 if has_float64(gradients[0].device) else torch.float32  # such devices share no run
    each = [torch.linalg.vector_norm(_local(g), dtype=dtype) for g in gradients]
    sums = [each, *([each[place] for place in part] for part in parts if part)]
    squares = torch.stack([torch.stack(norms).square().sum() for norms in sums])
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    if sharded:
        assert len(sharded) == len(gradients), "some gradients are sharded and some are not"
        distributed.all_reduce(squares, group=shard_group(sharded[0]))
    found = iter(squares.sqrt().float())
    return [next(found), *(next(found) if part else torch.zeros_like(squares[0]).float() for part in parts)]


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The first of :func:`gradient_norms`: of all gradients together."""
    return gradient_norms(gradients, [])[0]


def _local(gradient: Tensor) -> Tensor:
    """This process's share; the storage is the gradient's own."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
