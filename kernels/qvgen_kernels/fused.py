"""Layers of one input as one layer: the canonical tensors of q, k and v, so that x is quantized once.

Sums of an output do not depend on the other outputs, so a merged layer computes the same bits as its parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from qvgen_kernels.contract import LinearSpec

__all__ = ["Canonical", "merge_linears"]


class Canonical(NamedTuple):
    """The tensors of one layer as a checkpoint holds them.

    Attributes:
        planes: uint8, kernels/README.md, "Bytes".
        scale: float32 [N] or [N, G].
        zero_point: uint8 or float32 like the scale; None where symmetric.
        bias: float32 [N] or None.
        spec: the layer.
    """

    planes: Sequence[Tensor]
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None
    spec: LinearSpec


def merge_linears(layers: Sequence[Canonical]) -> Canonical:
    """Layers of one input as one layer whose outputs stand side by side.

    Args:
        layers: Specs that differ in out_features alone and have no branch; all with a bias or all without. Clips, input
            scale and static ranges of the layers must be equal too, which is the caller's to know.

    Returns:
        The merged layer; split its output by the layers' out_features.

    Raises:
        ValueError: specs that differ, a branch, or a bias that some lack.
    """
    first = layers[0].spec
    for layer in layers:
        if replace(layer.spec, out_features=first.out_features) != first:
            raise ValueError(f"{layer.spec} and {first} differ in more than out_features; call them one by one")
        if layer.spec.branch_rank:
            raise ValueError(f"branch_rank={layer.spec.branch_rank}; layers with a branch can't be merged")
        if (layer.bias is None) != (layers[0].bias is None):
            raise ValueError("some of the layers have a bias and some have none; give all of them one")
    zeros = [layer.zero_point for layer in layers if layer.zero_point is not None]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return Canonical(
        planes=[torch.cat(parts) for parts in zip(*(layer.planes for layer in layers), strict=True)],
        scale=torch.cat([layer.scale for layer in layers]),
        zero_point=torch.cat(zeros) if zeros else None,
        bias=torch.cat(biases) if biases else None,
        spec=replace(first, out_features=sum(layer.spec.out_features for layer in layers)),
    )
