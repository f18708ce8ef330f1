"""AdamW's two moments in 8 bits (arXiv 2110.02861), by torchao: its code table and its step.

    moment [N, K]  ~  table[codes] * scale        codes uint8 [N, K], scale float32 [N, K / block]

A block is a part of one row: the largest power of two up to 256 that divides its length. Rows are what processes share out,
so a share of codes and scales is that of the whole tensor, and a sharded run has the bits of one process. (torchao's own
blocks are 256 numbers of the flattened share, whose ends depend on how it was cut.) Tensors of fewer than 4096 numbers, and
those whose rows have no such block, keep moments in float32, as there.

torchao compiles its step; here it runs eagerly, one tensor at a time, so that it takes no compiler and gives the same bits in
every process.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qvgen.errors import UserError

LARGEST_BLOCK = 256
SMALLEST_BLOCK = 32
SMALLEST_TENSOR = 4096


def block_size(shape: torch.Size) -> int | None:
    """Numbers of a weight of a shape that share a scale; None where its moments stay in float32.

    Example:
        >>> block_size(torch.Size([5120, 13824])), block_size(torch.Size([1920, 1920])), block_size(torch.Size([64, 64]))
        (256, 128, 64)
        >>> block_size(torch.Size([64, 65])), block_size(torch.Size([8, 64]))
        (None, None)
    """
    if len(shape) < 2 or shape.numel() < SMALLEST_TENSOR:
        return None
    block = math.gcd(shape[1:].numel(), LARGEST_BLOCK)
    return block if block >= SMALLEST_BLOCK else None


@cache
def torchao_modules() -> tuple[ModuleType, ModuleType]:
    """Torchao's modules of the step and of tensors in 8 bits.

    Raises:
        UserError: It is not installed, or another version than the one whose parts are used here.
    """
    try:
        with _quiet():
            from torchao.optim import adam, subclass_8bit
    except ImportError as error:
        reason = "it is not installed" if "torchao" in str(error) else str(error)
        raise UserError(f"optim.name=adamw_8bit needs torchao ({reason}); pip install 'torchao>=0.18,<0.19'") from error
    if not hasattr(adam, "single_param_adam") or not hasattr(subclass_8bit, "OptimState8bit"):
        raise UserError("optim.name=adamw_8bit needs another torchao than this one; pip install 'torchao>=0.18,<0.19'")
    return adam, subclass_8bit


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torchao logs of its kernels for other machines, of which none is used."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@cache
def _table(signed: bool, device: torch.device) -> Tensor:
    """Torchao's 256 values of a code, float32."""
    table: Tensor = torchao_modules()[1].OptimState8bit.zeros((1, 256), signed, 256, device).qmap
    return table


@dataclass(frozen=True, kw_only=True, eq=False)
class EightBitMoment:
    """One moment of this process's share of a weight.

    Attributes:
        codes: uint8, of the weight's shape.
        scale: float32 [rows, blocks of a row].
        signed: Whether it has both signs (the first moment).
    """

    codes: Tensor
    scale: Tensor
    signed: bool

    @classmethod
    def zeros(cls, like: Tensor, *, block: int, signed: bool) -> EightBitMoment:
        """All zero: a scale of 0, whatever the codes mean."""
        scale = torch.zeros(like.shape[0], like.shape[1:].numel() // block, device=like.device)
        return cls(codes=torch.zeros_like(like, dtype=torch.uint8), scale=scale, signed=signed)

    def as_torchao(self) -> Any:
        """Torchao's tensor over the same memory: what it writes is written here."""
        table = _table(self.signed, self.codes.device)
        return torchao_modules()[1].OptimState8bit(self.codes, self.scale.view(-1), table, self.signed, torch.float32)

    def dequantize(self) -> Tensor:
        """Its values, float32."""
        values: Tensor = self.as_torchao().dequantize()
        return values


def eight_bit_step_(
    value: Tensor,
    gradient: Tensor,
    moments: tuple[EightBitMoment, EightBitMoment],
    *,
    step: Tensor,
    group: dict[str, Any],
) -> None:
    """One step of AdamW, in place, on a float32 tensor and its moments."""
    first, second = (moment.as_torchao() for moment in moments)
    rates = (group["lr"], *group["betas"], group["weight_decay"], group["eps"])
    torchao_modules()[0].single_param_adam(value, gradient, step, first, second, None, *rates, True, False)
