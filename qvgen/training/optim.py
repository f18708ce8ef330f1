"""Optimizer and learning rate: AdamW with the groups of the QVGen recipe, warm-up and cosine.

Weights and the factors of Phi decay; scales, zero points, clips, biases and norms do not (a decayed scale would shrink
the grid itself). Clips have a learning rate of their own: they are logits, on another scale than weights.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import nn

from qvgen.config.sections import OptimConfig

log = logging.getLogger(__name__)


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Groups for the optimizer: named, in a fixed order, empty ones left out.

    Returns:
        Dicts of name, params, lr (peak), weight_decay.
    """
    groups: dict[str, list[nn.Parameter]] = {
        "weights": [],
        "phi": [],
        "scales": [],
        "clips": [],
        "biases_and_norms": [],
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        modules = set(name.split("."))
        if modules & {"weight_quantizer", "other_weight_quantizers"}:
            groups["scales"].append(parameter)
        elif modules & {"activation_quantizer", "other_activation_quantizers"}:
            groups["clips"].append(parameter)
        elif "phi" in modules:
            groups["phi"].append(parameter)
        else:
            groups["weights" if parameter.ndim > 1 else "biases_and_norms"].append(parameter)
    result = []
    for name, parameters in groups.items():
        if parameters:
            rate = optim.clip_learning_rate if name == "clips" else optim.learning_rate
            decay = optim.weight_decay if name in ("weights", "phi") else 0.0
            result.append({"name": name, "params": parameters, "lr": rate, "weight_decay": decay})
    return result


def learning_rate_factor(step: int, *, num_steps: int, warmup_share: float) -> float:
    """Share of the peak learning rate in optimizer step ``step``: linear warm-up from above 0, then cosine to 0.

    Example:
        >>> [round(learning_rate_factor(s, num_steps=10, warmup_share=0.2), 3) for s in (0, 1, 2, 6, 9)]
        [0.5, 1.0, 1.0, 0.5, 0.038]
    """
    warmup = round(warmup_share * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def build_optimizer(
    model: nn.Module, optim: OptimConfig, *, num_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW over the model's parameter groups, and its schedule, to be stepped once per optimizer step."""
    groups = parameter_groups(model, optim)
    for group in groups:
        log.info(
            "optimizer group %s: %d tensors, %d parameters, peak learning rate %g, weight decay %g",
            group["name"], len(group["params"]), sum(p.numel() for p in group["params"]), group["lr"], group["weight_decay"],
        )  # fmt: skip
    # The CPU's fused kernel rounds the last numbers of a tensor, which fill no vector, in another way than the rest: cut
    # into shares, a parameter would be trained to other bits.
    on_gpu = next(model.parameters()).device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps, fused=on_gpu, foreach=not on_gpu)

    def factor(step: int) -> float:
        return learning_rate_factor(step, num_steps=num_steps, warmup_share=optim.warmup_share)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def forget_moments_(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Set the moments and the step count of a parameter to 0, in place: it now means something else."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, torch.Tensor):
            value.zero_()
