"""LinearSpec and LinearTensors: the two halves of the packed linear's contract. The arithmetic is in kernels/README.md.

A spec says everything about one layer that is not a tensor, and nothing about how a backend computes it. It
travels through the registered operator as its canonical JSON text, because an operator takes tensors, numbers
and strings only; the text is made once, so that tracing a layer under torch.compile meets a constant.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from qvgen_kernels.hadamard import KINDS, has_matrix, rotation_sizes

__all__ = ["INT32_LIMIT", "MAX_BITS", "MIN_BITS", "SCALE_FLOOR", "SPAN_FLOOR", "LinearSpec", "LinearTensors"]

MIN_BITS, MAX_BITS = 2, 8

INT32_LIMIT = 2**31
"""No accumulator may reach this: a backend sums in int32 and must not wrap."""

SCALE_FLOOR = {"float32": 1e-8, "bfloat16": 1e-8, "float16": 2.0**-14}
"""Smallest activation scale per scale_dtype. float16 has no 1e-8 (it would be 0, and 1/scale infinite): its
smallest normal number stands in, so that backends which flush subnormals agree."""

SPAN_FLOOR = 1e-10
"""Smallest largest magnitude of a row that is divided by its scale (activation_arithmetic "division")."""

_WEIGHT_ZERO_POINTS = ("integer", "real", "none")
_ACTIVATION_ZERO_POINTS = ("integer", "none")
_ACTIVATION_RANGES = ("dynamic", "static")
_FUNCTIONS = ("none", "gelu_tanh", "silu")
_ARITHMETICS = ("reciprocal", "division", "unrounded")

_ADDED_LATER = {"function": "none", "rotation_kind": "sylvester", "activation_arithmetic": "reciprocal"}
"""Fields that the text leaves out where they have these values: it is then the text of before they existed."""


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """Shape and grids of one packed linear.

    Attributes:
        in_features: K, columns of the input and of the weight.
        out_features: N, rows of the weight.
        weight_bits: width of a weight code, 2..8.
        weight_zero_point: "integer" (uint8 in 0..2^bits-1), "real" (float32) or "none" (symmetric: codes are
            stored as q + 2^(bits-1)).
        weight_group_size: columns that share a weight scale and zero point; 0 = the whole row (per channel).
        activation_bits: width of an activation code, 2..8.
        activation_zero_point: "integer" or "none" (symmetric, codes in +-(2^(bits-1)-1)).
        activation_group_size: columns that share an activation scale and zero point; 0 = the whole row (per
            token).
        scale_dtype: the precision that ACTIVATION scales are rounded to. Weight scales come as float32 and
            are used as they are: whoever made them has rounded them already.
        rotation: block size of the Hadamard transform of the input; 0 = none. Powers of two, and those times b, an
            order of Paley's (:mod:`qvgen_kernels.hadamard`): 1920 = 60 * 32, 8960 = 140 * 64.
        rotation_kind: "sylvester" (what the line above says) or "regular": powers of a 4 x 4 matrix with one -1 a row,
            sizes 4, 16, 64, 256, ...
        activation_range: "dynamic" (every row's own minimum and maximum) or "static" (a scale and a zero point come
            with every row; no activation groups then).
        branch_rank: rank of the low-rank branch on the input in floating point; 0 = none.
        activation_arithmetic: how symmetric codes follow from a row's range: "reciprocal" (times 1 / scale), "division"
            (by the scale) or "unrounded" (times the reciprocal of the scale before it was rounded to scale_dtype).
        function: Function of every output, after the bias: "none", "gelu_tanh" (GELU by tanh) or "silu".

    Raises:
        ValueError: a field outside its range, a group or rotation that does not divide in_features, two
            different group sizes, or sums that could leave int32.

    Example:
        >>> spec = LinearSpec(in_features=96, out_features=64, weight_bits=3, activation_bits=3)
        >>> spec.accumulator_bound
        4704
        >>> LinearSpec.from_string(spec.to_string()) == spec
        True
    """

    in_features: int
    out_features: int
    weight_bits: int
    weight_zero_point: str = "integer"
    weight_group_size: int = 0
    activation_bits: int
    activation_zero_point: str = "integer"
    activation_group_size: int = 0
    scale_dtype: str = "float32"
    rotation: int = 0
    activation_range: str = "dynamic"
    branch_rank: int = 0
    function: str = "none"
    rotation_kind: str = "sylvester"
    activation_arithmetic: str = "reciprocal"
    _text: str = field(init=False, repr=False, compare=False, default="")

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features"):
            _check_int(name, getattr(self, name), low=1)
        for name in ("weight_bits", "activation_bits"):
            _check_int(name, getattr(self, name), low=MIN_BITS, high=MAX_BITS)
        for name in ("weight_group_size", "activation_group_size", "rotation", "branch_rank"):
            _check_int(name, getattr(self, name), low=0)
        for name, allowed in (
            ("weight_zero_point", _WEIGHT_ZERO_POINTS),
            ("activation_zero_point", _ACTIVATION_ZERO_POINTS),
            ("scale_dtype", tuple(SCALE_FLOOR)),
            ("activation_range", _ACTIVATION_RANGES),
            ("function", _FUNCTIONS),
            ("rotation_kind", KINDS),
            ("activation_arithmetic", _ARITHMETICS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(allowed)}")
        self._check_sizes()
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        values = {name: value for name, value in values.items() if _ADDED_LATER.get(name) != value}
        object.__setattr__(self, "_text", json.dumps(values, sort_keys=True, separators=(",", ":")))

    def _check_sizes(self) -> None:
        if self.activation_range == "static" and self.activation_group_size:
            raise ValueError(
                f"activation_group_size={self.activation_group_size} with static ranges; a row has one scale, use 0"
            )
        dynamic_symmetric = self.activation_zero_point == "none" and self.activation_range == "dynamic"
        if self.activation_arithmetic != "reciprocal" and not dynamic_symmetric:
            name = f"activation_arithmetic={self.activation_arithmetic!r}"
            raise ValueError(f"{name} is of symmetric dynamic activations; use reciprocal")
        if self.branch_rank > min(self.in_features, self.out_features):
            raise ValueError(
                f"branch_rank={self.branch_rank} is above the rank of a [{self.out_features}, {self.in_features}] weight"
            )
        for name in ("weight_group_size", "activation_group_size"):
            value = getattr(self, name)
            if value and self.in_features % value:
                raise ValueError(f"{name}={value} does not divide in_features={self.in_features}; use a divisor or 0")
        self._check_rotation()
        sizes = (self.weight_group_size, self.activation_group_size)
        if all(sizes) and sizes[0] != sizes[1]:
            raise ValueError(
                f"weight_group_size={sizes[0]} and activation_group_size={sizes[1]} differ; make them equal"
            )
        if self.accumulator_bound >= INT32_LIMIT:
            raise ValueError(
                f"{self.group_size} columns at w{self.weight_bits}a{self.activation_bits} can sum to "
                f"{self.accumulator_bound}, which int32 can't hold; use fewer bits or a group size"
            )

    def _check_rotation(self) -> None:
        size, kind = self.rotation, self.rotation_kind
        exists = size != 1 and has_matrix(size, kind)
        if size == 0 or (exists and self.in_features % size == 0):
            return
        sizes = rotation_sizes(self.in_features, kind)
        nearest = [*[n for n in sizes if n < size][-1:], *[n for n in sizes if n > size][:1]]
        matrix = "regular Hadamard matrix" if kind == "regular" else "Hadamard matrix"
        problem = f"does not divide in_features={self.in_features}" if exists else f"has no {matrix} here"
        raise ValueError(f"rotation={size} {problem}; use {' or '.join(map(str, [0, *nearest]))}")

    @property
    def group_size(self) -> int:
        """Columns of one accumulator: the group size of either side, or in_features."""
        return self.weight_group_size or self.activation_group_size or self.in_features

    @property
    def num_groups(self) -> int:
        """Accumulators per output element."""
        return self.in_features // self.group_size

    @property
    def num_weight_groups(self) -> int:
        """Weight scales per row."""
        return self.in_features // (self.weight_group_size or self.in_features)

    @property
    def activation_qmax(self) -> int:
        """Largest activation code."""
        symmetric = self.activation_zero_point == "none"
        return (1 << (self.activation_bits - symmetric)) - 1

    @property
    def weight_operand_bound(self) -> int:
        """Largest |weight operand|: q - z (integer), the raw code (real), or code - 2^(bits-1) (none)."""
        full = (1 << self.weight_bits) - 1
        return (full + 1) // 2 if self.weight_zero_point == "none" else full

    @property
    def accumulator_bound(self) -> int:
        """Largest |accumulator| that any input can give (an activation operand q - z is at most qmax)."""
        return self.group_size * self.activation_qmax * self.weight_operand_bound

    def to_string(self) -> str:
        """Canonical JSON (sorted keys, no spaces), equal for equal specs; computed once."""
        return self._text

    @staticmethod
    def from_string(text: str) -> LinearSpec:
        """Inverse of :meth:`to_string`; cached, because the operator parses it on every call.

        Raises:
            ValueError: no JSON object, a missing or unknown key, or a value that the spec refuses.
        """
        return _parse(text)


class LinearTensors(NamedTuple):
    """The tensors that a call gets besides x and the packed weight; x has M rows, an entry that is not there is None.

    Gate and residual are what a transformer block does with the outputs, ``residual + gate * f(y)``, with the roundings of
    the separate operators.

    Attributes:
        bias: float32 [N].
        clip_low: float32 [M], factor on every row's minimum (dynamic ranges; unused by symmetric activations).
        clip_high: float32 [M], factor on every row's maximum.
        input_scale: float32 [K], factor on every column of x before all else; the branch does not see it.
        row_scale: float32 [M], every row's scale: static ranges need it.
        row_zero_point: float32 [M], whole numbers in 0..qmax; static ranges with zero points need it.
        branch_down: [r, K] of any floating type: y += (x branch_down^T) branch_up^T.
        branch_up: [N, r].
        gate: [S, N], factor on the outputs of M / S rows that follow each other (a sample); S divides M. Of x's dtype:
            the product is rounded to it, then the sum; float32: both are float32, and the result is rounded once.
        residual: [M, N] of x's dtype, added last.
    """

    bias: Tensor | None = None
    clip_low: Tensor | None = None
    clip_high: Tensor | None = None
    input_scale: Tensor | None = None
    row_scale: Tensor | None = None
    row_zero_point: Tensor | None = None
    branch_down: Tensor | None = None
    branch_up: Tensor | None = None
    gate: Tensor | None = None
    residual: Tensor | None = None


@lru_cache(maxsize=4096)
def _parse(text: str) -> LinearSpec:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"spec {text!r} is no JSON ({error}); pass LinearSpec.to_string()") from error
    expected = {f.name for f in fields(LinearSpec) if f.init}
    if not isinstance(values, dict) or set(values) | set(_ADDED_LATER) != expected:
        raise ValueError(f"spec {text!r} must have exactly the keys {sorted(expected)}; pass LinearSpec.to_string()")
    return LinearSpec(**values)


def _check_int(name: str, value: object, *, low: int, high: int | None = None) -> None:
    # bool is an int to Python; True as a bit-width is a mistake, not 1.
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise ValueError(f"{name}={value!r} must be a whole number {f'from {low} to {high}' if high else f'>= {low}'}")
