"""Types of the weights that a run trains, and of their gradients (``optim.masters``, ``optim.gradients``).

Only weights of quantized layers change: they are 99 of 100 numbers, and the quantizers bring them to float32 in any case.
Scales, zero points, clips, biases, norms, Phi and what is not quantized stay float32.
"""

from __future__ import annotations

import torch
from torch import nn

from qvgen.errors import UserError
from qvgen.layers.swap import quantized_layers


def has_grad_dtype() -> bool:
    """Whether this torch can add gradients up in another type than the parameter's."""
    return hasattr(torch.Tensor, "grad_dtype")


def narrow_masters_(student: nn.Module, *, masters: str, gradients: str) -> None:
    """Bring a prepared student's trained weights, and the gradients to come, to the configured types, in place.

    Args:
        student: On any device, with ``requires_grad`` as it is trained.
        masters: ``optim.masters``.
        gradients: ``optim.gradients``.

    Raises:
        UserError: See :func:`check_masters`: the method trains no weights of layers; or torch is too old.
    """
    check_masters(student, masters=masters, gradients=gradients)
    if masters == gradients == "float32":
        return
    for weight in trained_weights(student):
        weight.data = weight.data.to(getattr(torch, masters))
        if has_grad_dtype():
            weight.grad_dtype = getattr(torch, gradients)  # type: ignore[attr-defined]


def check_masters(student: nn.Module, *, masters: str, gradients: str) -> None:
    """Raise UserError where :func:`narrow_masters_` would find nothing to narrow, or can't."""
    if masters == gradients == "float32":
        return
    if not trained_weights(student):
        raise UserError(
            f"optim.masters={masters} optim.gradients={gradients}: the method trains no weights of quantized "
            "layers; write float32 for both"
        )
    if masters != gradients and not has_grad_dtype():
        raise UserError(
            f"optim.gradients={gradients} with optim.masters={masters} needs torch >= 2.10 and this is "
            f"{torch.__version__}; write optim.gradients={masters}"
        )


def widen_masters_(student: nn.Module) -> None:
    """Bring a student's weights back to float32, in place: the same values, for folding and measuring."""
    for layer in quantized_layers(student).values():
        weight = layer.weight
        if torch.float32 == weight.dtype == getattr(weight, "grad_dtype", torch.float32):
            continue
        weight.grad = None
        weight.data = weight.data.float()
        if has_grad_dtype():
            weight.grad_dtype = torch.float32  # type: ignore[attr-defined]


def trained_weights(student: nn.Module) -> list[nn.Parameter]:
    """Weights of quantized layers that are trained."""
    return [layer.weight for layer in quantized_layers(student).values() if layer.weight.requires_grad]
