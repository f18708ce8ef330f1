"""Optimizer and learning rate: AdamW over the groups that a training method names; warm-up, cosine and tail."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qvgen.config.schema.learning_rate_tail import LearningRateTail
from qvgen.config.schema.sections import OptimConfig
from qvgen.lowrank.sharded import is_sharded
from qvgen.training.optim.eight_bit import torchao_modules
from qvgen.training.optim.streamed_adamw import StreamedAdamW

log = logging.getLogger(__name__)


def learning_rate_factor(
    step: int, *, num_steps: int, warmup_share: float, tail: LearningRateTail | None = None
) -> float:
    """Share of the peak learning rate in optimizer step ``step``: linear warm-up from above 0, then cosine to 0.

    With a tail the cosine ends at its rate where it begins; there the rate stays, or falls on to 0 by another cosine.

    Example:
        >>> [round(learning_rate_factor(s, num_steps=10, warmup_share=0.2), 3) for s in (0, 1, 2, 6, 9)]
        [0.5, 1.0, 1.0, 0.5, 0.038]
        >>> tail = LearningRateTail(tail_share=0.2, tail_rate=0.5, tail="constant")
        >>> [learning_rate_factor(s, num_steps=10, warmup_share=0.2, tail=tail) for s in (0, 2, 5, 8, 9)]
        [0.5, 1.0, 0.75, 0.5, 0.5]
    """
    warmup = round(warmup_share * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if tail is None or not tail.tail_share:
        return _cosine(step - warmup, num_steps - warmup)
    begin = max(warmup, num_steps - math.ceil(tail.tail_share * num_steps))  # as Phi's tail does
    if step < begin:
        return tail.tail_rate + (1 - tail.tail_rate) * _cosine(step - warmup, begin - warmup)
    return tail.tail_rate * (1.0 if tail.tail == "constant" else _cosine(step - begin, num_steps - begin))


def _cosine(step: int, num_steps: int) -> float:
    """From 1 at step 0 to 0 after the last."""
    return 0.5 * (1.0 + math.cos(math.pi * step / max(1, num_steps)))


class AdamW(torch.optim.AdamW):
    """torch's AdamW, which steps the local shares of sharded parameters; its state holds sharded tensors, as torch's does.

    AdamW works number by number, so a share needs no other share: the bits are those of sharded tensors. These would ask for
    each operator, list of tensors and shape how its result is sharded, which takes longer than the arithmetic. The name is
    torch's, since loggers name learning rates after it.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """Fill torch's lists: parameters, gradients, both moments, their maxima, steps."""
        has_complex: bool = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]
        return has_complex


def build_optimizer(
    groups: Sequence[Mapping[str, Any]], optim: OptimConfig, *, num_steps: int, seed: int = 0
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW over groups of parameters, and its schedule, to be stepped once per optimizer step.

    Args:
        groups: Mappings of name, params, lr (peak) and weight_decay; see :meth:`qvgen.methods.base.Method.parameter_groups`.
        optim: Which optimizer, its betas, eps, warm-up and tail.
        num_steps: Optimizer steps of the whole run.
        seed: Of what is drawn where masters are rounded by chance.

    Raises:
        UserError: A library that the optimizer needs is not there.
    """
    for group in groups:
        log.info(
            "optimizer group %s: %d tensors, %d parameters, peak learning rate %g, weight decay %g",
            group["name"], len(group["params"]), sum(p.numel() for p in group["params"]), group["lr"], group["weight_decay"],
        )  # fmt: skip
    optimizer = _adamw(groups, optim, seed=seed)

    def factor(step: int) -> float:
        return learning_rate_factor(step, num_steps=num_steps, warmup_share=optim.warmup_share, tail=optim)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _adamw(groups: Sequence[Mapping[str, Any]], optim: OptimConfig, *, seed: int) -> torch.optim.Optimizer:
    """Torch's own where everything is float32 and on the device, which takes all tensors at once."""
    if optim.name == "adamw_8bit" or optim.offload or "bfloat16" in (optim.masters, optim.gradients):
        check_optimizer(optim)
        return StreamedAdamW(
            groups,
            betas=optim.betas,
            eps=optim.eps,
            eight_bit=optim.name == "adamw_8bit",
            offload=optim.offload,
            seed=seed,
        )
    # The CPU's fused kernel rounds the last numbers of a tensor, which fill no vector, in another way than the rest: cut
    # into shares, a parameter would be trained to other bits.
    on_gpu = groups[0]["params"][0].device.type == "cuda"
    return AdamW([dict(group) for group in groups], betas=optim.betas, eps=optim.eps, fused=on_gpu, foreach=not on_gpu)


def check_optimizer(optim: OptimConfig) -> None:
    """Raise UserError where a library that the optimizer needs is not there, before anything is computed."""
    if optim.name == "adamw_8bit":
        torchao_modules()
