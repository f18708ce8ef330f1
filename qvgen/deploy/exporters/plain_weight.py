"""The weight of a packed layer in ordinary coordinates: rotation, smoothing and branch undone.

Equations of a layer as it is packed, and as one product:

layer    y = H (x m) Q^T + (x D^T) U^T        Q [N, K]: the dequantized weight, H its own transpose
plain    y = x W^T                            W = (Q H) m + U D
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvgen.layers.fake_quant_product import rotated
from qvgen.layers.packed_linear import PackedLinear


@torch.no_grad()
def plain_weight(layer: PackedLinear) -> Tensor:
    """W float32 [N, K]: what multiplies the layer's inputs as they come, at the profile's own width."""
    weight = rotated(layer.dequantized_weight(), layer.profile)
    if layer.input_scale is not None:
        weight = weight * layer.input_scale
    if layer.branch_down is not None and layer.branch_up is not None:
        weight = weight + layer.branch_up.float() @ layer.branch_down.float()
    return weight


def weight_changes(layer: PackedLinear) -> bool:
    """Whether the layer has weights of several widths, between which it changes while sampling."""
    return layer.form.width_table is not None and len(layer.form.weight_widths) > 1
