"""The backend ``gluon``: the Triton backend with another product and weights of a byte each, on Hopper alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from qvgen_kernels.contract import LinearSpec
from qvgen_kernels.gluon.layout import arrange, packed_bytes
from qvgen_kernels.gluon.tile import KERNEL, tile_of
from qvgen_kernels.triton.backend import Product, TritonBackend, device_card
from qvgen_kernels.triton.layout import PackedWeight, named_weight
from qvgen_kernels.triton.tuned import is_faster, tuned_tiles
from qvgen_kernels.weight import CanonicalWeight

__all__ = ["GluonBackend"]

CAPABILITY = (9, 0)
OLDEST_TRITON = (3, 9)
"""Gluon's names change from one version to the next; these are 3.9's."""


class GluonBackend(TritonBackend):
    """The product for Hopper; auto takes it where the table of measured tiles says that it is faster than Triton's."""

    name = KERNEL
    priority = 55

    def refusal(self, spec: LinearSpec, *, device: torch.device) -> str | None:
        """A sentence on what is missing on this machine, or what of the layer does not run; None where all is there."""
        if device.type != "cuda":
            return f"kernel=gluon runs on CUDA devices, not on {device}"
        if (reason := super().refusal(spec, device=device)) is not None:
            return reason
        capability = device_card(device).capability
        if capability != CAPABILITY:
            name = torch.cuda.get_device_name(device)
            return f"{name} has compute capability {capability[0]}.{capability[1]}; it must be 9.0 (H100, H200); use triton"
        if spec.num_groups > 1:
            return f"it has no groups of {spec.group_size} columns; use kernel=triton"
        return _missing_gluon()

    def preferred(self, spec: LinearSpec, *, device: torch.device) -> bool:
        """Whether auto takes it before backends of higher priority: it was measured to be faster for these layers."""
        card = device_card(device).name
        return bool(card) and is_faster(KERNEL, "triton", tuned_tiles(card), spec)

    def prepacked_bytes(self, spec: LinearSpec) -> int:
        """Memory that a layer's prepacked tensors take."""
        return packed_bytes(spec)

    def _arrange(self, parts: Sequence[CanonicalWeight], *, spec: LinearSpec) -> list[Tensor]:
        return arrange(parts, spec=spec)

    def _named(self, weight: Sequence[Tensor], spec: LinearSpec) -> PackedWeight:
        return named_weight(weight, spec=spec, bytewise=True)

    def _multiply(self, product: Product) -> None:
        from qvgen_kernels.gluon.gemm import run_product

        y, tensors, card = product.y, product.tensors, device_card(product.y.device)
        tail = tensors.gate is not None or tensors.residual is not None
        tile = tile_of(product.spec, rows=len(y), card=card, tail=tail)
        run_product(product, tile, programs=card.processors)


def _missing_gluon() -> str | None:
    from triton import __version__ as version

    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < OLDEST_TRITON:
        return f"Triton is {version}; Gluon's names are those of {'.'.join(map(str, OLDEST_TRITON))}; use kernel=triton"
    if importlib.util.find_spec("triton.experimental.gluon") is None:
        return "this Triton comes without Gluon; use kernel=triton"
    return None
