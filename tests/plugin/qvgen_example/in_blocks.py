"""A kernel backend: the reference's arithmetic by blocks of rows, which bounds its scratch memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qvgen_kernels import LinearSpec, LinearTensors, register_backend
from qvgen_kernels.reference import ReferenceBackend

ROWS = 64
OF_ROWS = ("clip_low", "clip_high", "row_scale", "row_zero_point", "residual")


class InBlocks(ReferenceBackend):
    """See :class:`qvgen_kernels.registry.Backend`."""

    name = "in_blocks"
    priority = -1

    def refusal(self, spec: LinearSpec, *, device: torch.device) -> str | None:
        """Only on the CPU."""
        return None if device.type == "cpu" else f"it runs on a CPU, not on {device}"

    def linear(self, x: Tensor, weight: Sequence[Tensor], *, tensors: LinearTensors, spec: LinearSpec) -> Tensor:
        """Map x [M, K] to [M, N], 64 rows at a time."""
        if tensors.gate is not None or len(x) <= ROWS:
            return super().linear(x, weight, tensors=tensors, spec=spec)
        parts = []
        for start in range(0, len(x), ROWS):
            rows = slice(start, start + ROWS)
            own = {name: value[rows] for name in OF_ROWS if (value := getattr(tensors, name)) is not None}
            parts.append(super().linear(x[rows], weight, tensors=tensors._replace(**own), spec=spec))
        return torch.cat(parts)


register_backend(InBlocks())
