"""The packed weight as a backend receives it: its tensors, checks, what all prepacks share, and unpacking of planes.

The layout is that of qvgen's packed checkpoints (kernels/README.md, "Bytes"). It is unpacked here a second
time, because this package imports nothing of qvgen; a test holds the two to each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from qvgen_kernels.contract import LinearSpec

__all__ = ["CanonicalPrepack", "CanonicalWeight", "check_weight", "unpack_planes"]


class CanonicalWeight(NamedTuple):
    """The weight of a layer as a checkpoint holds it.

    Attributes:
        planes: uint8, kernels/README.md, "Bytes".
        scale: float32 [N] or [N, G].
        zero_point: uint8 ("integer") or float32 ("real") like the scale; None for "none".
    """

    planes: Sequence[Tensor]
    scale: Tensor
    zero_point: Tensor | None


class CanonicalPrepack(ABC):
    """The part that the prepacks of all backends share: checks of every part, and one layer as the case of one part."""

    def prepack(
        self, planes: Sequence[Tensor], *, scale: Tensor, zero_point: Tensor | None, spec: LinearSpec
    ) -> list[Tensor]:
        """Bring one layer's canonical tensors into this backend's order.

        Raises:
            ValueError: as :func:`check_weight`.
        """
        return self.prepack_parts([CanonicalWeight(planes, scale, zero_point)], spec=spec)

    def prepack_parts(self, parts: Sequence[CanonicalWeight], *, spec: LinearSpec) -> list[Tensor]:
        """Bring layers of one input, their outputs one below the other, into this backend's order as one weight.

        Args:
            parts: At least one; all on one device.
            spec: The spec of the whole: its out_features is the sum of the parts'.

        Raises:
            ValueError: parts whose rows do not add up to out_features; else as :func:`check_weight`.
        """
        rows = [part.planes[0].shape[0] if len(parts) > 1 else spec.out_features for part in parts]
        if sum(rows) != spec.out_features:
            raise ValueError(f"parts of {rows} outputs do not make out_features={spec.out_features}")
        for part, count in zip(parts, rows, strict=True):
            check_weight(
                part.planes, scale=part.scale, zero_point=part.zero_point, spec=replace(spec, out_features=count)
            )
        return self._arrange(parts, spec=spec)

    @abstractmethod
    def _arrange(self, parts: Sequence[CanonicalWeight], *, spec: LinearSpec) -> list[Tensor]:
        """The tensors that ``linear`` takes, of parts that were checked."""


def plane_shapes(spec: LinearSpec) -> list[tuple[int, int]]:
    """Shapes of the canonical uint8 planes of a layer."""
    per_byte = {2: (4,), 3: (4, 8), 4: (2,)}.get(spec.weight_bits, (1,))
    return [(spec.out_features, (spec.in_features + codes - 1) // codes) for codes in per_byte]


def unpack_planes(planes: Sequence[Tensor], *, spec: LinearSpec) -> Tensor:
    """Raw unsigned codes, uint8 [N, K], of planes that :func:`check_weight` accepted; exact."""
    if spec.weight_bits > 4:
        return planes[0].contiguous()

    def fields(plane: Tensor, width: int) -> Tensor:
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device)
        codes = (plane.unsqueeze(-1) >> shifts) & ((1 << width) - 1)
        return codes.flatten(1)[:, : spec.in_features]

    if spec.weight_bits == 4:
        return fields(planes[0], 4).contiguous()
    codes = fields(planes[0], 2)
    if spec.weight_bits == 3:
        codes = codes | (fields(planes[1], 1) << 2)
    return codes.contiguous()


def check_weight(planes: Sequence[Tensor], *, scale: Tensor, zero_point: Tensor | None, spec: LinearSpec) -> None:
    """Check the tensors of one layer; :class:`CanonicalPrepack` does so before any backend sees them.

    Args:
        planes: canonical uint8 planes.
        scale: float32 [N], or [N, K/g] where the weight has groups; > 0.
        zero_point: uint8 ("integer") or float32 ("real"), shaped like scale; None for "none".
        spec: the layer.

    Raises:
        ValueError: a tensor that is missing, of the wrong dtype, shape or device, or holds impossible values.
    """
    shapes = plane_shapes(spec)
    if [tuple(plane.shape) for plane in planes] != shapes or any(plane.dtype != torch.uint8 for plane in planes):
        given = [(plane.dtype, list(plane.shape)) for plane in planes]
        raise ValueError(f"planes are {given}; {spec.weight_bits}-bit weights need torch.uint8 of shapes {shapes}")
    if 4 < spec.weight_bits < 8 and int(planes[0].max()) >= 2**spec.weight_bits:
        raise ValueError(f"weight code {int(planes[0].max())} does not fit into {spec.weight_bits} bits")
    groups = spec.num_weight_groups
    shape = (spec.out_features, groups) if spec.weight_group_size else (spec.out_features,)
    if scale.dtype != torch.float32 or tuple(scale.shape) != shape:
        raise ValueError(f"weight scale is {scale.dtype} {list(scale.shape)}; it must be torch.float32 {list(shape)}")
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise ValueError("weight scale has values that are not finite and positive; the checkpoint is damaged")
    if spec.weight_zero_point == "none":
        if zero_point is not None:
            raise ValueError("zero_point given for symmetric weights; pass None or weight_zero_point='integer'")
        return
    dtype = torch.uint8 if spec.weight_zero_point == "integer" else torch.float32
    if zero_point is None or zero_point.dtype != dtype or tuple(zero_point.shape) != shape:
        found_text = "missing" if zero_point is None else f"{zero_point.dtype} {list(zero_point.shape)}"
        raise ValueError(
            f"zero_point is {found_text}; weight_zero_point={spec.weight_zero_point!r} needs {dtype} {list(shape)}"
        )
    if dtype == torch.uint8 and int(zero_point.max()) >= 2**spec.weight_bits:
        raise ValueError(f"zero_point {int(zero_point.max())} is above the largest code {2**spec.weight_bits - 1}")
    if not bool(zero_point.isfinite().all()):
        raise ValueError("zero_point has values that are not finite; the checkpoint is damaged")
