"""The packed weight as a backend receives it: checks, and unpacking of the canonical planes.

The layout is that of qvgen's packed checkpoints (kernels/README.md, "Bytes"). It is unpacked here a second
time, because this package imports nothing of qvgen; a test holds the two to each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qvgen_kernels.contract import LinearSpec

__all__ = ["check_weight", "unpack_planes"]


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
    """Check the tensors of one layer. Every backend's prepack calls this first.

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
        found = [(plane.dtype, list(plane.shape)) for plane in planes]
        raise ValueError(f"planes are {found}; {spec.weight_bits}-bit weights need torch.uint8 of shapes {shapes}")
    if spec.weight_bits > 4 and int(planes[0].max()) >= 2**spec.weight_bits:
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
