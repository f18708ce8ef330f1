"""Products of codes as 8-bit integers: with the bits of the product in floating point, on processors that are faster at it.

Codes minus a zero point are whole numbers. Where their sums stay below 2^24 a float32 sum of them is exact, and an int32 sum
is the same number: rounded to the type of the product it has the same bits. What is multiplied with the weight in floating
point, as an active Phi, is no whole number and is left to the floating-point product; so are gradients.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from qvgen_kernels.fake_quantize import RowSpec, fits_int8

Mode = Literal["auto", "always", "never"]
"""``auto``: CPUs with VNNI, where it was measured; ``always``: CUDA and ROCm too, where it has not run; or ``never``."""

_EXACT = 2**24
"""Whole numbers up to here have an exact float32 sum in any order."""

_MIN_ROWS, _MULTIPLE = 17, 8
"""Least number of rows that torch's product on a GPU takes, and what its columns and outputs are multiples of."""

_mode: dict[str, Mode] = {"products": "auto"}


def set_int8_products(mode: Mode) -> None:
    """Choose where products of codes are computed with integers in this process from now on; no result depends on it.

    Raises:
        ValueError: Another word.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"int8 products {mode!r}; write {', '.join(get_args(Mode))}")
    _mode["products"] = mode


def are_whole(left: RowSpec, right: RowSpec, *, columns: int) -> bool:
    """Whether both operands are int8 numbers whose float32 sum over ``columns`` is exact.

    Args:
        left: The input's rows.
        right: The weight's rows as the product takes them, without Phi.
        columns: Columns that are summed.
    """
    return fits_int8(left) and fits_int8(right) and columns * _largest(left) * _largest(right) <= _EXACT


def _largest(rows: RowSpec) -> int:
    return rows.qmax - rows.qmin if rows.zero_point == "integer" else max(rows.qmax, -rows.qmin)


def runs_here(x: Tensor, outputs: int) -> bool:
    """Whether such a product of x [M, K] with ``outputs`` rows of a weight is to be computed with integers."""
    if _mode["products"] == "never":
        return False
    if x.device.type == "cpu":
        return torch.cpu._is_vnni_supported()
    fits = x.shape[0] >= _MIN_ROWS and x.shape[1] % _MULTIPLE == 0 and outputs % _MULTIPLE == 0
    return _mode["products"] == "always" and x.device.type == "cuda" and fits


def product(left: Tensor, right: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Left [M, K] times right [N, K], transposed, as ``dtype`` [M, N]: by int32 sums where both are int8."""
    if left.dtype is not torch.int8:
        return functional.linear(left, right)
    return torch._int_mm(left, right.mT).to(dtype)
