"""The form of a quantized attention, all but the values of its tensors: plain data for manifests and resumed runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from qvgen.after_import import after_import
from qvgen.config.plain_json import flag, text, whole
from qvgen.quant.attention_profile import AUTO, AttentionKind, AttentionProfile
from qvgen_kernels.attention import AttentionSpec

MAX_HEADS = 2**12
"""Most heads of an attention that a manifest may give; the widest video transformer has 40."""


@dataclass(frozen=True, kw_only=True)
class AttentionForm:
    """The form of one attention module.

    Attributes:
        kind: ``int8`` or ``int8_qk``, as in :class:`~qvgen.quant.attention_profile.AttentionProfile`.
        heads: Heads H of the queries.
        head_size: Elements D of a query, a key and a value of one head.
        smooth_key: Whether the mean of the keys is subtracted.
        rotation: Whether queries and keys are rotated.
        clips: Whether it has learned factors, float32 [num_bands, H] each.

    Raises:
        ValueError: A head size that the kernels do not have, or a rotation of it that there is no matrix for.

    Example:
        >>> form = AttentionForm(kind="int8", heads=30, head_size=64, smooth_key=True, rotation=False, clips=True)
        >>> AttentionForm.from_dict(form.to_dict()) == form
        True
    """

    kind: AttentionKind
    heads: int
    head_size: int
    smooth_key: bool
    rotation: bool
    clips: bool

    def __post_init__(self) -> None:
        self.spec()

    @classmethod
    def of(cls, profile: AttentionProfile, *, heads: int, head_size: int) -> Self:
        """The form of an attention with so many heads of so many elements, as a profile wants it; auto: not yet chosen.

        What is left to calibration is what a profile has that does not name it: keys are smoothed, and nothing is rotated.
        """
        own = {
            "smooth_key": profile.smooth_key is not False,
            "rotation": profile.rotation is True,
            "clips": profile.clips,
        }
        return cls(kind=profile.kind, heads=heads, head_size=head_size, **own)

    def candidates(self, profile: AttentionProfile) -> tuple[Self, ...]:
        """The forms that a profile leaves to choose from, this one first.

        Example:
            >>> profile = AttentionProfile(kind="int8", rotation="auto")
            >>> tuple(form.label for form in AttentionForm.of(profile, heads=2, head_size=64).candidates(profile))
            ('int8 2 x 64', 'int8 2 x 64 rotated')
        """
        smooth = (True, False) if profile.smooth_key == AUTO else (self.smooth_key,)
        can_turn = profile.rotation == AUTO and self._has_matrix()
        turned = (False, True) if can_turn else (self.rotation,)
        return tuple(replace(self, smooth_key=keys, rotation=rotation) for keys in smooth for rotation in turned)

    def spec(self, softmax_scale: float | None = None) -> AttentionSpec:
        """The kernels' description of it, for a factor of the scores that a call gives; None: 1 / sqrt(D)."""
        return AttentionSpec(
            head_size=self.head_size,
            softmax_scale=softmax_scale,
            smooth_key=self.smooth_key,
            rotation=self.head_size if self.rotation else 0,
            kind=self.kind,
        )

    def _has_matrix(self) -> bool:
        """Whether there is a Hadamard matrix of the head's size; the kernels' own description of it knows."""
        try:
            replace(self, rotation=True)
        except ValueError:
            return False
        return True

    @property
    def label(self) -> str:
        """Short name, for example ``int8 30 x 64 rotated``."""
        options = {" rotated": self.rotation, " clipped": self.clips, " keys not smoothed": not self.smooth_key}
        return f"{self.kind} {self.heads} x {self.head_size}" + "".join(name for name, on in options.items() if on)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`; raises KeyError, TypeError or ValueError for anything malformed."""
        options = {key: flag(data[key], f"{key} of an attention") for key in ("smooth_key", "rotation", "clips")}
        profile = AttentionProfile(kind=text(data["kind"], "kind of an attention"), **options)  # type: ignore[arg-type]
        heads = whole(data["heads"], "heads of an attention", low=1, high=MAX_HEADS)
        return cls.of(profile, heads=heads, head_size=whole(data["head_size"], "head_size of an attention", low=4))


def scaled_spec(form: AttentionForm, scale: float) -> AttentionSpec:
    """A form as the kernels describe it, at a factor of the scores; a constant for torch's compiler."""
    return form.spec(float(scale))


after_import("torch._dynamo", then="qvgen.layers.traced_constants")
