"""The grid: which values a quantized tensor may take, and the profile: the two grids of a Linear.

A grid maps real numbers to integer codes ``q`` and back by ``x ~ scale * (q - zero_point)``. Everything that
training and deployment must agree on is a field here, so two frozen objects that compare equal describe the
same numbers to the bit. What a field means for the arithmetic is in :mod:`qvgen.quant.affine`.

Symmetric grids (``zero_point="none"``) are restricted to ``+-(2**(bits-1) - 1)``: int4 uses -7..7 and never
-8, as the int4 runtimes do. Asymmetric grids use all ``2**bits`` codes.

Sources: LSQ+ (arXiv 2004.09576) for the asymmetric form; profiles are described in docs/method.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

import torch

from qvgen.config.plain_json import options_of, whole
from qvgen.quant.attention_profile import NO_ATTENTION, AttentionProfile
from qvgen.quant.hadamard import KINDS, check_rotation, nearest_sizes, read_rotation
from qvgen.quant.runtime import Runtime

Granularity = Literal["per_tensor", "per_channel", "per_token", "per_group"]
ZeroPointKind = Literal["integer", "real", "none"]
ScaleDtype = Literal["float32", "bfloat16", "float16"]
Arithmetic = Literal["reciprocal", "division", "unrounded"]
RotationKind = Literal["sylvester", "regular"]

MIN_BITS, MAX_BITS = 2, 8
MIN_SCALE = 1e-8
"""Smallest scale (units of the tensor): a row of zeros gets this one and dequantizes to exact zeros."""

MAX_ROTATION = 2**20
"""Largest rotation that is accepted: more than the columns of any layer."""

MIN_SPAN = 1e-10
"""Smallest largest magnitude of a row where codes are quotients by the scale (arithmetic ``division``)."""

_BITS = ("bits",)
_OF_NO_LAYER = ("rotations", "runtime", "attention")
_SCALE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One uniform affine grid.

    Attributes:
        bits: Code width, 2 to 8.
        granularity: What shares a scale. ``per_channel`` (rows of a weight ``[N, K]``) and ``per_token`` (rows of
            an activation ``[..., K]``) are the same arithmetic over the last dimension; ``per_group`` cuts that
            dimension into groups of ``group_size``.
        zero_point: ``integer`` (a code), ``real`` (fractional, as in the QVGen release) or ``none`` (symmetric).
        group_size: Columns per group, greater than 0; required for ``per_group`` and refused elsewhere.
        scale_dtype: The precision that scales are rounded to right after they are computed. The arithmetic
            itself is float32 always.
        arithmetic: How codes follow from a range. ``reciprocal`` multiplies by 1 / scale. The others are those of other
            people's kernels, for symmetric activations: ``division`` divides by the scale (comfy-kitchen), ``unrounded``
            multiplies by the reciprocal of the scale before it was rounded to ``scale_dtype`` (Nunchaku, cache-dit).
        clip: Whether learned factors cut the range of an activation; False: codes reach its largest value, as in runtimes
            that have no such factors.

    Raises:
        ValueError: A value outside of what is said here.
    """

    bits: int
    granularity: Granularity
    zero_point: ZeroPointKind = "integer"
    group_size: int | None = None
    scale_dtype: ScaleDtype = "float32"
    arithmetic: Arithmetic = "reciprocal"
    clip: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"bits={self.bits!r} is outside {MIN_BITS}..{MAX_BITS}; choose a whole number in there")
        for name, value, allowed in (
            ("granularity", self.granularity, get_args(Granularity)),
            ("zero_point", self.zero_point, get_args(ZeroPointKind)),
            ("scale_dtype", self.scale_dtype, tuple(_SCALE_DTYPES)),
            ("arithmetic", self.arithmetic, get_args(Arithmetic)),
            ("clip", self.clip, (True, False)),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(map(str, allowed))}")
        if self.arithmetic != "reciprocal" and (self.zero_point != "none" or self.granularity == "per_tensor"):
            kind = f"zero_point={self.zero_point!r} and granularity={self.granularity!r}"
            raise ValueError(
                f"arithmetic={self.arithmetic!r} is of symmetric dynamic ranges, not {kind}; use reciprocal"
            )
        if self.granularity == "per_group":
            if not isinstance(self.group_size, int) or self.group_size < 1:
                raise ValueError(f"group_size={self.group_size!r} with per_group; give a positive number of columns")
        elif self.group_size is not None:
            raise ValueError(f"group_size={self.group_size} needs granularity='per_group', not {self.granularity!r}")

    @property
    def symmetric(self) -> bool:
        """Whether the grid has no zero point and codes of both signs."""
        return self.zero_point == "none"

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -self.qmax if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        """``scale_dtype`` as torch names it."""
        return _SCALE_DTYPES[self.scale_dtype]

    def num_groups(self, columns: int) -> int:
        """Number of scales along a row of ``columns`` values.

        Raises:
            ValueError: ``group_size`` does not divide ``columns``.
        """
        if self.group_size is None:
            return 1
        if columns % self.group_size:
            fitting = [size for size in (16, 32, 64, 96, 128, 256) if columns % size == 0]
            raise ValueError(
                f"group_size={self.group_size} does not divide in_features={columns}; "
                f"use {' or '.join(map(str, fitting)) or 'a divisor of it'}"
            )
        return columns // self.group_size


def static_grid(grid: Grid) -> Grid:
    """Copy a grid with one float32 scale for all tokens (per_tensor); its codes stay as they are."""
    return replace(grid, granularity="per_tensor", group_size=None, scale_dtype="float32", arithmetic="reciprocal")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The pair of grids (and the rotation) that a quantized Linear is trained with and deployed with.

    Attributes:
        name: ``paper``, ``svdq_g64``, ``convrot``, ``int8``, or a user's own.
        weight: Grid of the weight ``[N, K]``; per channel or per group.
        activation: Grid of the input ``[..., K]``, never with a real zero point: per token or per group with ranges taken
            at run time, or per_tensor, static: one scale for all tokens of a sampling step, from a table.
        rotation: Block size of the normalized Hadamard transform that the input passes before it is quantized
            (the weight is stored rotated); 0 for none. Any size of :func:`qvgen.quant.hadamard.hadamard_order`, the
            whole row included: 1920, 3072, 8960.
        rotations: Sizes of which :meth:`fitted` takes the first that divides every in_features of a model; empty:
            ``rotation`` is the only one.
        rotation_kind: ``sylvester``, or ``regular``: other matrices, of sizes 4, 16, 64, 256 (:mod:`qvgen.quant.hadamard`).
        runtime: The kernels that the profile is for, where they have limits; it changes no number.
        attention: Attention in 8 bits, of the model and not of a Linear; None: as the model computes it.

    Raises:
        ValueError: A granularity that does not belong to that side, or a rotation that has no Hadamard matrix here.
    """

    name: str
    weight: Grid
    activation: Grid
    rotation: int = 0
    rotations: tuple[int, ...] = ()
    rotation_kind: RotationKind = "sylvester"
    runtime: Runtime | None = field(default=None, compare=False)
    attention: AttentionProfile | None = None

    def __post_init__(self) -> None:
        if self.weight.granularity not in ("per_channel", "per_group"):
            raise ValueError(f"weight granularity {self.weight.granularity!r}; use per_channel or per_group")
        if self.activation.granularity not in ("per_token", "per_group", "per_tensor"):
            kind = self.activation.granularity
            raise ValueError(f"activation granularity {kind!r}; use per_token, per_group or per_tensor (static)")
        if self.activation.granularity == "per_tensor" and self.activation.scale_dtype != "float32":
            raise ValueError("static activation scales (per_tensor) are float32; write scale_dtype: float32")
        if self.activation.zero_point == "real":
            raise ValueError("activation zero_point 'real' runs on no integer kernel; use integer or none")
        if self.weight.arithmetic != "reciprocal" or not self.weight.clip:
            raise ValueError(
                "arithmetic and clip are of activations: a weight's codes are stored; leave them out of weight"
            )
        if self.rotation_kind not in KINDS:
            raise ValueError(f"rotation_kind={self.rotation_kind!r} is unknown; use one of {', '.join(KINDS)}")
        for size in (self.rotation, *self.rotations):
            check_rotation(whole(size, "rotation", low=-MAX_ROTATION, high=MAX_ROTATION), self.rotation_kind)
        w_group, a_group = self.weight.group_size, self.activation.group_size
        if w_group and a_group and w_group != a_group:
            raise ValueError(f"weight group_size={w_group} and activation group_size={a_group} differ; make them equal")

    @property
    def label(self) -> str:
        """Short name of the bit-widths, for example ``w4a8``."""
        return f"w{self.weight.bits}a{self.activation.bits}"

    def check_fits(self, in_features: int) -> None:
        """Raise ValueError where a row of ``in_features`` values can't be grouped or rotated as the profile says."""
        self.weight.num_groups(in_features)
        self.activation.num_groups(in_features)
        if self.rotation and in_features % self.rotation:
            nearest = nearest_sizes(self.rotation, columns=in_features, kind=self.rotation_kind)
            sizes = " or ".join(map(str, [0, *nearest]))
            raise ValueError(f"rotation={self.rotation} does not divide in_features={in_features}; use {sizes}")

    def fitted(self, in_features: Iterable[int]) -> Profile:
        """The profile for layers of these widths: with the first of its ``rotations`` that divides them all.

        Raises:
            ValueError: None of them does.
        """
        if not self.rotations:
            return self
        widths = sorted(set(in_features))
        for size in self.rotations:
            if not size or all(columns % size == 0 for columns in widths):
                return replace(self, rotation=size, rotations=())
        last = replace(self, rotation=self.rotations[-1], rotations=())
        for columns in widths:
            last.check_fits(columns)
        return last

    def with_rotation(self, size: int) -> Profile:
        """The profile with another block, of Sylvester's kind, which has a matrix for the whole row of every model."""
        return replace(self, rotation=size, rotations=(), rotation_kind="sylvester")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict of the numbers of a layer's profile, for checkpoints."""
        return {name: value for name, value in asdict(self).items() if name not in _OF_NO_LAYER}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Profile:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: A missing or unknown key, or a value that :class:`Grid` refuses.
        """
        given, names = dict(data), {field.name for field in fields(cls)} - {*_OF_NO_LAYER}
        if set(given) != names:
            raise ValueError(f"profile keys {sorted(given)} differ from {sorted(names)}")
        try:
            grids = {side: Grid(**given[side]) for side in ("weight", "activation")}
        except TypeError as error:
            raise ValueError(f"profile {given.get('name')!r} has a malformed grid: {error}") from error
        return cls(**(given | grids))


def profile_from_bits(
    *,
    name: str,
    weight_bits: int,
    activation_bits: int,
    weight: Mapping[str, Any],
    activation: Mapping[str, Any],
    rotation: int | Mapping[str, Any] = 0,
    runtime: Mapping[str, Any] | None = None,
    attention: str | Mapping[str, Any] = NO_ATTENTION,
) -> Profile:
    """Build a profile from the two bit-widths and the grid options of a ``conf/profile`` file.

    Args:
        name: Name of the profile, as reports and manifests have it.
        weight_bits: Bits of a weight code, 2 to 8.
        activation_bits: Bits of an activation code, 2 to 8.
        weight: The weight's grid; keys of :class:`Grid` but for ``bits``.
        activation: The activation's grid; keys of :class:`Grid` but for ``bits``.
        rotation: Block size of the Hadamard rotation that inputs pass before they are quantized; 0 for none. It must divide
            every in_features (64 divides 1920), or be the whole row. ``{kind: regular, sizes: [256, 64]}``: ConvRot's kind of
            matrices, of the first size that divides them all.
        runtime: The kernels that it is for: name, weight_bits, activation_bits, additions (:class:`Runtime`). Bits and
            methods that they lack are refused. None: qvgen's own, which take all.
        attention: ``none``; ``int8``: softmax(q k^T) v with 8-bit integers where a Linear is quantized; ``int8_qk``: q k^T;
            or ``{kind: int8, smooth_key: true, rotation: false, clips: false, include: [], exclude: []}``; auto: calibrated.

    Raises:
        ValueError: See :class:`Grid` and :class:`Profile`.

    Example:
        >>> profile = profile_from_bits(
        ...     name="paper", weight_bits=3, activation_bits=4,
        ...     weight={"granularity": "per_channel"}, activation={"granularity": "per_token"},
        ... )
        >>> profile.label, profile.weight.qmax, profile.activation.qmax
        ('w3a4', 7, 15)
    """
    kind, sizes = read_rotation(rotation)
    return Profile(
        name=name,
        weight=Grid(bits=weight_bits, **options_of(Grid, weight, name="profile.weight", given=_BITS)),
        activation=Grid(bits=activation_bits, **options_of(Grid, activation, name="profile.activation", given=_BITS)),
        rotation=sizes[0],
        rotations=sizes if len(sizes) > 1 else (),
        rotation_kind=kind,
        runtime=None if runtime is None else Runtime.from_dict(runtime),
        attention=AttentionProfile.read(attention),
    )
