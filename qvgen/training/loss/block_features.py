"""Feature distillation: the outputs of a student's blocks against the full-precision model's at the same inputs.

    loss = mean over samples and chosen blocks of |h - h_teacher|^2 / |h_teacher|^2

h is what a block hands on of the video (the first tensor that it returns), [B, tokens, channels]; both norms are a sample's.
The quotient makes blocks of different loudness count alike, and the term's size one of relative errors, whatever the model.

A student's outputs are inputs of the blocks that follow, which are kept for the backward pass anyway; besides them the term
keeps the teacher's outputs and nothing else: differences are computed again in the backward pass. Hooks stand outside of what
is compiled, sharded or computed again, and are there for one forward pass.

Source: distillation of intermediate features (FitNets, 1412.6550), of every block (TinyBERT, 1909.10351), without their
projections, since both models have one width. Left out: attention maps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qvgen.config.schema.loss import LossConfig
from qvgen.errors import UserError
from qvgen.methods.base import Method
from qvgen.training.distributed.sharding import blocks_of


@contextmanager
def compared_outputs(model: nn.Module, loss: LossConfig | None) -> Iterator[list[Tensor]]:
    """Collect what the compared blocks return while a model is called once inside, in their order.

    Args:
        model: A transformer.
        loss: The options that say which blocks are compared; None: none.

    Yields:
        Float [B, tokens, channels] of each, part of the graph of the model's output; none where none is compared.

    Raises:
        UserError: There are no such blocks.
    """
    if loss is None or not loss.feature_weight:
        yield []
        return
    every, blocks = blocks_of(model), loss.feature_blocks
    check_blocks(blocks, count=len(every))
    found: list[Tensor] = []

    def keep(block: nn.Module, args: Any, output: Any) -> None:
        del block, args
        found.append(output if isinstance(output, Tensor) else output[0])

    chosen = range(len(every)) if blocks is None else sorted(blocks)
    handles = [every[number].register_forward_hook(keep) for number in chosen]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def check_blocks(blocks: Sequence[int] | None, *, count: int) -> None:
    """Raise UserError where a model of so many blocks does not have these."""
    if not count:
        raise UserError(
            "loss.feature_weight compares blocks, and this model has no list of blocks; write loss.feature_weight=0"
        )
    if blocks is not None and max(blocks) >= count:
        raise UserError(
            f"loss.feature_blocks holds {max(blocks)}, and the model has {count} blocks; write numbers of 0..{count - 1}"
        )


def check_features(loss: LossConfig, *, method: Method, name: str) -> None:
    """Raise UserError where a method, called ``name``, has no teacher whose blocks could be compared."""
    if loss.feature_weight and not method.needs_teacher:
        raise UserError(
            f"loss.feature_weight={loss.feature_weight} compares blocks with the full-precision model's, which method={name} "
            "has no use for; choose kd, qvgen, qdm or efficientdm, or write loss.feature_weight=0"
        )


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Mean relative squared error of blocks' outputs; gradients go to the student's alone.

    Args:
        student: Float [B, tokens, channels] of each block.
        teacher: The same of the full-precision model, in whatever type it computes in.

    Returns:
        float32 [] (float64 for tensors of that type).

    Example:
        >>> h, wanted = torch.tensor([[[1.0, 3.0]], [[2.0, 0.0]]]), torch.tensor([[[1.0, 1.0]], [[2.0, 2.0]]])
        >>> round(feature_loss([h], [wanted]).item(), 4)  # (4 / 2 + 4 / 8) / 2
        1.25
    """
    pairs = zip(student, teacher, strict=True)
    return torch.stack([_RelativeError.apply(mine, wanted) for mine, wanted in pairs]).mean()


class _RelativeError(torch.autograd.Function):
    """|h - w|^2 / |w|^2 of each sample, [B]; d/dh = 2 (h - w) / |w|^2. It saves h and w, which are there anyway."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        squared, energy = _squared_norm(_apart(student, teacher)), _squared_norm(_wide(teacher))
        energy = torch.where(energy > 0, energy, 1)  # of a block that puts out nothing the error itself counts
        ctx.save_for_backward(student, teacher, energy)
        return squared / energy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        student, teacher, energy = ctx.saved_tensors
        factor = (2 * gradient / energy).view(-1, *(1,) * (student.ndim - 1))
        return _apart(student, teacher).mul_(factor).to(student.dtype), None


def _wide(value: Tensor) -> Tensor:
    """In float32, or float64 where it is: squares of bfloat16 would lose small differences."""
    return value if value.dtype == torch.float64 else value.float()


def _apart(student: Tensor, teacher: Tensor) -> Tensor:
    return _wide(student) - _wide(teacher)


def _squared_norm(value: Tensor) -> Tensor:
    """Of each sample, [B]."""
    norm: Tensor = torch.linalg.vector_norm(value.flatten(1), dim=1)
    return norm.square()
