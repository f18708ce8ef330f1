r"""Steps of a block before a layer quantizes its input, as a part of the layer: kernels/README.md, "Input steps".

    norm          v = (x - mean) * rstd * weight + bias     sums in whole numbers, so that no backend's order matters
    modulation    v = gain * v + shift
    type          v = T(v)
    function      v = f(v), torch's own to the bit

This file is the reference of all four in plain torch. A backend that has no steps of its own gets inputs that went through
:func:`apply_steps`, so each of them runs every layer with every step.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["InputSteps", "InputTensors", "apply_steps", "check_steps", "stated_norm"]

NORMS = ("none", "layer", "rms")
FUNCTIONS = ("none", "gelu_tanh", "silu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

WIDEST_NORM = 2**18
"""Columns up to which sums of squares stay within int64: squares are at most 2^44."""

_EXPONENT_BITS = 23
_INFINITY = 0x7F800000
_SMALLEST_EXPONENT, _LARGEST_EXPONENT = 27, 254


class InputSteps(NamedTuple):
    """The steps of a call, as far as they are no tensors. All of them may be left out.

    Attributes:
        norm: "none", "layer" (LayerNorm) or "rms" (RMSNorm), with the sums that the contract states.
        eps: Added to the variance.
        function: "none", "gelu_tanh" or "silu".
        dtype: T, "float32", "bfloat16" or "float16": the type that the input has after its steps, and the outputs; "": x's.
    """

    norm: str = "none"
    eps: float = 0.0
    function: str = "none"
    dtype: str = ""

    def to_string(self) -> str:
        """The text that travels through the registered operator."""
        return f"{self.norm},{self.eps!r},{self.function},{self.dtype}"

    @staticmethod
    def from_string(text: str) -> InputSteps:
        """Inverse of :meth:`to_string`; cached, because the operator parses it on every call.

        Raises:
            ValueError: text that is none of :meth:`to_string`, or an unknown value.
        """
        return _parse(text)

    def output_dtype(self, x: Tensor) -> torch.dtype:
        """T for an input x."""
        return DTYPES[self.dtype] if self.dtype else x.dtype


@lru_cache(maxsize=256)
def _parse(text: str) -> InputSteps:
    parts = text.split(",")
    try:
        norm, eps, function, dtype = parts[0], float(parts[1]), *parts[2:]
    except (IndexError, ValueError) as error:
        raise ValueError(f"input steps {text!r} can't be read; pass InputSteps.to_string()") from error
    for name, value, allowed in (
        ("norm", norm, NORMS),
        ("function", function, FUNCTIONS),
        ("dtype", dtype, ("", *DTYPES)),
    ):
        if value not in allowed:
            raise ValueError(
                f"{name}={value!r} of the input steps is unknown; use one of {', '.join(map(repr, allowed))}"
            )
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps={eps} of the input steps must be finite and not below 0")
    return InputSteps(norm, eps, function, dtype)


class InputTensors(NamedTuple):
    """The tensors of the steps; x has M rows, an entry that is not there is None.

    Attributes:
        gain: [S, K], factor on the rows: 1 + scale of an adaptive norm. Of x's dtype: norm, product and sum are each rounded
            to it; float32: they stay float32 until T.
        shift: [S, K] of gain's dtype, added after it; both or none.
        row: int32 [M], which row of gain and shift each row takes, from 0 to S - 1. None: S divides M, and M / S rows that
            follow each other take one.
        norm_weight: float32 or of x's dtype [K], factor after the norm.
        norm_bias: the same, added after it.
    """

    gain: Tensor | None = None
    shift: Tensor | None = None
    row: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None


def check_steps(x: Tensor, tensors: InputTensors, steps: InputSteps) -> None:
    """Check the tensors of the steps of x [..., K], without reading a value.

    Raises:
        ValueError: A tensor that is missing or too much, of the wrong dtype, shape or device.
    """
    rows, columns = math.prod(x.shape[:-1]), x.shape[-1]
    if (tensors.gain is None) != (tensors.shift is None):
        raise ValueError("gain and shift of the input steps come together; pass ones or zeros for the other")
    if steps.norm == "none" and (tensors.norm_weight is not None or tensors.norm_bias is not None):
        raise ValueError("norm_weight or norm_bias given with norm='none'; use norm='layer' or 'rms'")
    if steps.norm != "none" and columns > WIDEST_NORM:
        raise ValueError(f"a norm of {columns} columns; it can have up to {WIDEST_NORM}")
    count = 1 if tensors.gain is None else tensors.gain.shape[0] if tensors.gain.ndim == 2 else 0
    if tensors.row is None and (count == 0 or rows % count):
        raise ValueError(
            f"gain has {count} rows, which do not divide the {rows} rows of x; give one per sample, or row"
        )
    gain_dtypes = (x.dtype, torch.float32)
    wanted = {
        "gain": ((count, columns), gain_dtypes),
        "shift": ((count, columns), gain_dtypes if tensors.gain is None else (tensors.gain.dtype,)),
        "row": ((rows,), (torch.int32,)),
        "norm_weight": ((columns,), gain_dtypes),
        "norm_bias": ((columns,), gain_dtypes),
    }
    for name, tensor in tensors._asdict().items():
        if tensor is None:
            continue
        shape, dtypes = wanted[name]
        if tensor.shape != shape or tensor.dtype not in dtypes:
            allowed = " or ".join(map(str, dict.fromkeys(dtypes)))
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; it must be {allowed} {list(shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; move them to one device")


def apply_steps(x: Tensor, *, tensors: InputTensors, steps: InputSteps) -> Tensor:
    """Take rows through the steps, by torch's operators.

    Args:
        x: float32, bfloat16 or float16 [M, K].
        tensors: As :func:`check_steps` has checked them.
        steps: The steps.

    Returns:
        [M, K] of T.
    """
    v = x
    if steps.norm != "none":
        v = stated_norm(v, tensors.norm_weight, tensors.norm_bias, kind=steps.norm, eps=steps.eps)
        if tensors.gain is not None:
            v = v.to(tensors.gain.dtype)
    if tensors.gain is not None:
        assert tensors.shift is not None  # check_steps
        v = _modulated(v, tensors.gain, tensors.shift, tensors.row)
    v = v.to(steps.output_dtype(x))
    if steps.function == "gelu_tanh":
        return functional.gelu(v, approximate="tanh")
    return functional.silu(v) if steps.function == "silu" else v


def _modulated(v: Tensor, gain: Tensor, shift: Tensor, row: Tensor | None) -> Tensor:
    if row is not None:
        return v * gain[row] + shift[row]
    if not len(v):
        return v.to(torch.promote_types(v.dtype, gain.dtype))
    return (v.unflatten(0, (len(gain), -1)) * gain.unsqueeze(1) + shift.unsqueeze(1)).flatten(0, 1)


def stated_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, kind: str = "layer", eps: float = 0.0
) -> Tensor:
    """LayerNorm or RMSNorm of rows [M, K], float32, whose bits no order of additions changes.

    Each row is rounded to 22 bits below its largest magnitude; these whole numbers, and their squares, are summed in
    int64. The difference to torch's operator is in the last bits: 2^-22 of the largest magnitude of a row.

    Example:
        >>> stated_norm(torch.tensor([[1.0, 2.0, 3.0, 6.0]])).tolist()
        [[-1.0690449476242065, -0.5345224738121033, 0.0, 1.603567361831665]]
    """
    v = x.to(torch.float32)
    columns = v.new_full((), v.shape[-1])  # a tensor: on CUDA torch multiplies by a Python number's reciprocal
    if kind == "layer":
        up, down, finite = _powers(v)
        total = _whole(v * up).sum(-1, keepdim=True)
        v = v - torch.where(finite, total.to(torch.float32) / columns * down, math.nan)
    up, down, finite = _powers(v)
    total = _whole(v * up).square_().sum(-1, keepdim=True)
    variance = total.to(torch.float32) / columns * down * down
    rstd = 1.0 / _square_root(variance + eps)
    v = v * torch.where(finite, rstd, math.nan)
    if weight is not None:
        v = v * weight.to(torch.float32)
    return v if bias is None else v + bias.to(torch.float32)


def _square_root(x: Tensor) -> Tensor:
    """The IEEE square root of float32 numbers.

    On a CPU torch may take the vector function of a library (Intel MKL), which on some
    processors is off by one bit for a sixth of all numbers. A root in float64 is close enough to be rounded to the right one.
    """
    return torch.sqrt(x.double()).to(torch.float32) if x.device.type == "cpu" else torch.sqrt(x)


def _powers(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """2^(21 - k) and its inverse, float32 [M, 1], for a largest magnitude in [2^k, 2^(k+1)); and whether it is finite."""
    bits = v.abs().amax(-1, keepdim=True).view(torch.int32)
    exponent = (bits >> _EXPONENT_BITS).clamp(_SMALLEST_EXPONENT, _LARGEST_EXPONENT)
    up, down = (275 - exponent) << _EXPONENT_BITS, (exponent - 21) << _EXPONENT_BITS
    return up.view(torch.float32), down.view(torch.float32), bits < _INFINITY


def _whole(v: Tensor) -> Tensor:
    """The nearest whole numbers, int64; of rows that are not finite some number."""
    return v.nan_to_num(0.0, posinf=0.0, neginf=0.0).round_().to(torch.int64)
