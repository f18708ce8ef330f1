"""Static properties of a quantized attention and its constants: what kernels/attention.md defines.

spec = AttentionSpec(head_size=64)
check_tensors(q, k, v, mask=None, tensors=AttentionTensors(), spec=spec)
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from qvgen_kernels.hadamard import has_matrix

__all__ = ["BLOCK", "AttentionKind", "AttentionSpec", "AttentionTensors", "check_tensors"]

AttentionKind = Literal["int8", "int8_qk"]
"""The operands in 8 bits: of both products, or of q k^T alone; of the other one they have the type of v then."""

BLOCK = 64
"""Keys whose probabilities share one exponent, and tokens whose sum is one partial sum of a mean."""

EXP2 = (1.4485299587249756, -0.6901440024375916, 0.23233066499233246)
"""254.5 / 256 times 2^(g - 1) / g for g in [1, 2], by rising powers of g: the quadratic of least relative error (3.5e-3),
each coefficient in float32. Times g 2^n it is a code, and g is the mantissa of that float32 number."""

EXP2_FINE = (1.775614619255066, -1.3773075342178345, 0.7074757218360901, -0.10644568502902985)
"""The cubic of least relative error (6.6e-4) of 2^(g - 1) / g likewise, for probabilities that are no 8-bit codes."""

FINE_BITS = 15
"""The largest probability of a block is about 2 to this power where probabilities are no 8-bit codes: a sum of 64 such whole
numbers is exact in float32, in any order, and float16 holds each."""

WHOLE = 12582912.0
"""1.5 times 2^23: a sum with it is rounded to a whole number, halves to even."""

SPAN = 16.0
"""Powers of two below a block's largest exponent that codes are computed for; what lies lower has the code 0 anyway."""

SLACK = 2.0**-22
"""A block's exponent lies this share of its largest score higher, so that no rounding lifts a score above it."""

LARGEST_KEY = 2.0**100
"""A key whose scale is not below this is not finite, so that no score of one that is leaves float32."""

LARGEST_VALUE = 2.0**88
"""A value that is not below this is not finite where values are not quantized: no sum over 2^24 keys leaves float32."""

REACH = 64.0
"""Powers of two by which sums are rescaled at most: what is further away vanishes beside a float32 number in any case."""

FLUSHED = 2.0**-100
"""A rescaled sum that is smaller than this is zero, so that no backend ever meets a subnormal number."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_KEYS = 1 << 24
_KEYS = ("head_size", "kind", "softmax_scale", "smooth_key", "rotation")


class AttentionTensors(NamedTuple):
    """Learned clips of a call, each float32 [H] or None for 1: factors of the largest magnitude that is kept."""

    query_clip: Tensor | None = None
    key_clip: Tensor | None = None


@dataclass(frozen=True)
class AttentionSpec:
    """Everything about an attention that is known before it is called.

    Args:
        head_size: Elements D of a query, a key and a value of one head; a multiple of 4 from 4 to 256.
        softmax_scale: Factor of the scores; None: 1 / sqrt(D).
        smooth_key: Whether the mean of the keys over all tokens is subtracted. It changes no exact softmax, because it adds
            the same number to all scores of a query (SageAttention, arXiv 2410.02367, section 4.2).
        rotation: D: queries and keys are rotated by the Hadamard matrix of that size, which changes no exact score; 0: not.
        kind: ``int8``: queries, keys, probabilities and values in 8 bits; ``int8_qk``: queries and keys.

    Raises:
        ValueError: a value outside of its range.
    """

    head_size: int
    softmax_scale: float | None = None
    smooth_key: bool = True
    rotation: int = 0
    kind: AttentionKind = "int8"
    _text: str = field(init=False, repr=False, compare=False, default="")

    def __post_init__(self) -> None:
        if self.head_size % 4 or not 4 <= self.head_size <= 256:
            raise ValueError(f"head_size={self.head_size} must be a multiple of 4 from 4 to 256")
        if self.softmax_scale is not None and not (math.isfinite(self.softmax_scale) and self.softmax_scale > 0):
            raise ValueError(
                f"softmax_scale={self.softmax_scale} must be a positive number, or None for 1 / sqrt(head_size)"
            )
        if self.rotation and (self.rotation != self.head_size or not has_matrix(self.rotation, "sylvester")):
            raise ValueError(
                f"rotation={self.rotation} must be 0, or head_size={self.head_size} where that has a matrix"
            )
        if self.kind not in get_args(AttentionKind):
            raise ValueError(f"kind={self.kind!r} is unknown; use {' or '.join(get_args(AttentionKind))}")
        values = {name: getattr(self, name) for name in _KEYS}
        object.__setattr__(self, "_text", json.dumps(values, sort_keys=True, separators=(",", ":")))

    @property
    def score_factor(self) -> float:
        """The float32 number that turns scores into exponents of two: softmax_scale times log2(e), rounded once."""
        scale = self.head_size**-0.5 if self.softmax_scale is None else self.softmax_scale
        return float(torch.tensor(scale * math.log2(math.e), dtype=torch.float64, device="cpu").float())

    def probability_type(self, dtype: torch.dtype) -> torch.dtype | None:
        """The type of probabilities for values of a type: theirs with ``int8_qk``; None: 8-bit codes."""
        return dtype if self.kind == "int8_qk" else None

    def to_string(self) -> str:
        """Canonical JSON (sorted keys, no spaces), equal for equal specs; computed once."""
        return self._text

    @staticmethod
    def from_string(text: str) -> AttentionSpec:
        """Inverse of :meth:`to_string`; cached, because the operator parses it on every call.

        Raises:
            ValueError: no JSON object, a missing or unknown key, or a value that the spec refuses.
        """
        return _parse(text)


@lru_cache(maxsize=64)
def _parse(text: str) -> AttentionSpec:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"spec {text!r} is no JSON ({error}); pass AttentionSpec.to_string()") from error
    if not isinstance(values, dict) or set(values) != set(_KEYS):
        raise ValueError(f"spec {text!r} must have exactly the keys {sorted(_KEYS)}; pass AttentionSpec.to_string()")
    return AttentionSpec(**values)


def check_tensors(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, tensors: AttentionTensors, spec: AttentionSpec
) -> None:
    """Check shapes, types and devices, without reading a value.

    Raises:
        ValueError: what does not fit, with both shapes.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4 or tensor.shape[-1] != spec.head_size:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; it must be [batch, heads, tokens, {spec.head_size}]"
            )
        if tensor.dtype not in _DTYPES or tensor.dtype != q.dtype:
            raise ValueError(f"{name} is {tensor.dtype}; q, k and v must all be float32, bfloat16 or float16")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device} and q on {q.device}; move them to one device")
    if k.shape != v.shape or k.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit; k and v must have q's batch and heads"
        )
    if k.shape[2] >= _MOST_KEYS:
        raise ValueError(f"{k.shape[2]} keys are too many; at most {_MOST_KEYS - 1}")
    if mask is not None:
        _check_mask(mask, q=q, k=k)
    for name, clip in tensors._asdict().items():
        if clip is not None and (
            clip.shape != q.shape[1:2] or clip.dtype is not torch.float32 or clip.device != q.device
        ):
            raise ValueError(
                f"{name} is {clip.dtype} {list(clip.shape)} on {clip.device}; it must be float32 [{q.shape[1]}]"
            )


def _check_mask(mask: Tensor, *, q: Tensor, k: Tensor) -> None:
    if mask.dtype is not torch.bool:
        raise ValueError(f"mask is {mask.dtype}; it must be bool, True where a query sees a key (no numbers are added)")
    wanted = (*q.shape[:3], k.shape[2])
    if mask.ndim != 4 or any(size not in (1, full) for size, full in zip(mask.shape, wanted, strict=True)):
        raise ValueError(f"mask has shape {list(mask.shape)}; it must be {list(wanted)}, where any size may be 1")
    if mask.device != q.device:
        raise ValueError(f"mask is on {mask.device} and q on {q.device}; move them to one device")
