"""The attention of a profile: whether products of softmax(q k^T) v are computed with 8-bit integers, and in which modules.

The arithmetic is that of kernels/attention.md, to the bit, in training and in deployment. This module says only which of its
options are used where. A profile without an :class:`AttentionProfile` leaves attention as the model computes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from qvgen.config.plain_json import flag, items, options_of, text

AttentionKind = Literal["int8", "int8_qk"]
"""The products of attention that 8-bit integers compute: both, or q k^T alone."""

ATTENTION_BITS: Mapping[AttentionKind, int] = {"int8": 8, "int8_qk": 12}
"""Bits of the operands, the mean of both products; 16 in floating point."""

AUTO: Literal["auto"] = "auto"
"""The value of an option that calibration chooses for every attention."""

Choice = bool | Literal["auto"]

NO_ATTENTION = "none"
"""The value of ``profile.attention`` that leaves attention in floating point."""


IN_WORDS: Mapping[str, str] = {"int8": "in 8 bits", "int8_qk": "with queries and keys in 8 bits"}
"""Kind of a quantized attention -> how a report and a model card call it."""


@dataclass(frozen=True, kw_only=True)
class AttentionProfile:
    """How attention is quantized.

    Attributes:
        kind: ``int8``: queries, keys, probabilities and values in 8 bits; ``int8_qk``: queries and keys, and probabilities
            and values in the type that the model computes in.
        smooth_key: Whether the mean of the keys over all tokens is subtracted before they are quantized (SageAttention,
            arXiv 2410.02367, 4.2); ``auto``: in the attentions whose outputs lose less by it on sampled inputs.
        rotation: Whether queries and keys are rotated by the Hadamard matrix of a head's size first; ``auto``: likewise, and
            only where that size has a matrix.
        clips: Whether a factor of the largest magnitude is learned for queries and for keys, by head and noise band; False:
            codes reach the largest magnitude.
        include: Name patterns (fnmatch) of the attention modules; empty: all that have a quantized Linear.
        exclude: Name patterns of attention modules to leave in floating point.

    Raises:
        ValueError: An unknown kind.
    """

    kind: AttentionKind
    smooth_key: Choice = True
    rotation: Choice = False
    clips: bool = False
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(AttentionKind):
            raise ValueError(
                f"profile.attention={self.kind!r} is unknown; use {NO_ATTENTION}, {' or '.join(get_args(AttentionKind))}"
            )

    @property
    def is_searched(self) -> bool:
        """Whether an option is left to calibration."""
        return AUTO in (self.smooth_key, self.rotation)

    @classmethod
    def read(cls, value: str | Mapping[str, Any]) -> AttentionProfile | None:
        """The attention of a file of conf/profile: a kind, or all options of this class; None for ``none``.

        Raises:
            ValueError: An unknown kind or option, or an option of another type.

        Example:
            >>> AttentionProfile.read("none") is None
            True
            >>> AttentionProfile.read({"kind": "int8", "exclude": ["*.attn2"]}).exclude
            ('*.attn2',)
        """
        options: Mapping[str, Any] = {"kind": value} if isinstance(value, str) else value
        given = options_of(cls, options, name="profile.attention", given=())
        if given["kind"] == NO_ATTENTION:
            if len(given) > 1:
                raise ValueError(f"profile.attention={dict(options)} has options of an attention that is not quantized")
            return None
        for key in ("smooth_key", "rotation"):
            if key in given and given[key] != AUTO and not isinstance(given[key], bool):
                raise ValueError(f"profile.attention.{key}={given[key]!r} is neither true, false nor auto")
        if "clips" in given:
            flag(given["clips"], "profile.attention.clips")
        for key in ("include", "exclude"):
            name = f"profile.attention.{key}"
            given[key] = tuple(text(pattern, name) for pattern in items(list(given.get(key, ())), name))
        return cls(**given)
