"""The low-rank branch of a quantized layer, which acts on the input as it comes, and the Phi that is kept as one.

    y = Q(X) Q(W)^T + (x D^T) U^T + bias        X = H (x m)

A branch is SVDQuant's (buffers), or a Phi of ``phi.keep=true`` (Parameters), or both: their ranks add. The Phi of
``phi.input=full`` acts in the same way until it is gone. With

    D = bfloat16((R H) m)     U = bfloat16(L gamma)

that Phi is L gamma R in the layer's coordinates, on the input before it is quantized: a deviation from the paper, whose Phi
multiplies Q(X), because no kernel adds a low rank there. Forward passes see the rounded factors, so that what is trained is
what is packed, bit for bit; gradients go straight through the rounding. Columns that were dropped take no part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qvgen.layers.fake_quant_product import rotated

if TYPE_CHECKING:
    from qvgen.layers.fake_quant_linear import FakeQuantLinear

BRANCH_DTYPE = torch.bfloat16
"""Type in which a branch is stored and computed; the quantized weight makes up for its rounding too."""

Factors = tuple[Tensor, Tensor]


def kept_rank(layer: FakeQuantLinear) -> int:
    """Rank of the Phi that folding makes a branch of; 0 where there is none."""
    return layer.phi.rank if layer.phi is not None and layer.phi.keep else 0


def check_phi_is_gone(layer: FakeQuantLinear) -> None:
    """Raise ValueError where a Phi that is not to be kept still has rank, so that the layer can't be folded."""
    if layer.phi is not None and layer.phi.rank and not layer.phi.keep:
        raise ValueError(
            f"Phi still has rank {layer.phi.rank}; train until its decay is over, then fold, or with phi.keep=true"
        )


def input_factors(layer: FakeQuantLinear) -> Factors | None:
    """D [r, K] and U [N, r] of a Phi on the input before they are rounded, float32, differentiable; None without one."""
    phi = layer.phi
    if phi is None or not (phi.keep or phi.on_input) or not phi.rank:
        return None
    rank = phi.rank
    with torch.autocast(phi.left.device.type, enabled=False):
        down = rotated(phi.right[:rank], layer.profile)
        down = down if layer.input_scale is None else down * layer.input_scale
        return down, phi.left[:, :rank] * phi.rank_gate[:rank]


@torch.no_grad()
def whole_branch(layer: FakeQuantLinear, kept: Factors | None) -> Factors | None:
    """The factors bfloat16 [r, K] and [N, r] of SVDQuant's branch and a kept Phi, as they are packed; None for no branch."""
    own = None if layer.branch_down is None or layer.branch_up is None else (layer.branch_down, layer.branch_up)
    if kept is None:
        return own
    down, up = (factor.detach().to(BRANCH_DTYPE).contiguous() for factor in kept)
    return (down, up) if own is None else (torch.cat([own[0], down]), torch.cat([own[1], up], dim=1))


def packed_floats(layer: FakeQuantLinear) -> dict[str, Tensor]:
    """Bias, smoothing vector and branch as the packed layer has them, by name, as far as there are any."""
    down, up = whole_branch(layer, input_factors(layer)) or (None, None)
    values = {"bias": layer.bias, "input_scale": layer.input_scale, "branch_down": down, "branch_up": up}
    return {name: value for name, value in values.items() if value is not None}


def check_kept_rank(layer: FakeQuantLinear) -> None:
    """Raise ValueError where SVDQuant's branch and a kept Phi together have more rank than the weight can have."""
    if layer.phi is None or not layer.phi.keep or layer.branch_down is None:
        return
    own, width = layer.branch_down.shape[0], min(layer.in_features, layer.out_features)
    if own + layer.phi.capacity > width:
        raise ValueError(
            f"a branch of rank {own} and phi.rank={layer.phi.capacity}, which phi.keep adds to it, are more than the rank "
            f"{width} of a Linear {layer.in_features} -> {layer.out_features}; write a lower phi.rank or init.rank"
        )


class BranchGradient(torch.autograd.Function):
    """The identity of an output y [M, N] that already holds a branch; gives the branch's factors their gradients.

    Inputs are y, x [M, K], D [r, K] and U [N, r], float32 and not rounded yet. x gets no gradient here: the product gave it.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """Return y."""
        ctx.save_for_backward(x, down, up)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With y = (x D^T) U^T: dU = dy^T (x D^T), dD = (dy U)^T x."""
        x, down, up = ctx.saved_tensors
        (grad,) = grads
        with torch.autocast(x.device.type, enabled=False):
            rows = x.to(grad.dtype)
            down, up = (factor.to(BRANCH_DTYPE).to(grad.dtype) for factor in (down, up))
            grad_up = grad.mT @ (rows @ down.mT)
            grad_down = (grad @ up).mT @ rows
        return grad, None, grad_down.float(), grad_up.float()
