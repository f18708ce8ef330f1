r"""Straight-through gradients of the grid, as pure functions of what the forward pass saw.

Rounding has derivative 1 (STE); clamps keep their own derivative. With x^ = s (q - z), m = 1 where the unclamped
code lies in [qmin, qmax] and 0 elsewhere, and g = dLoss/dx^:

    dx = g m                       (1)
    ds = sum g ((q - z) - m x/s)   (2)   LSQ, arXiv 1902.08153, Eq. 3
    dz = sum -g s (1 - m)          (3)   LSQ+, arXiv 2004.09576, Eq. 5

The same three lines hold for integer and real zero points: in range a change of z moves q along with it.

Dynamic activations have s and z that are functions of the row itself: lo = c_l min(x, 0), hi = c_h max(x, 0),
s = (hi - lo) / qmax, z = -lo / s. The path through them belongs to the gradient:

    ds <- ds + dz lo / s^2,    dlo = -dz / s - ds / qmax,    dhi = ds / qmax
    dc_l = dlo min,   dc_h = dhi max,   dx[argmin] += dlo c_l,   dx[argmax] += dhi c_h

Equal extremes share that last term evenly (as torch.amin does). Where the scale is at its floor or
ceiling, ds ends there; a minimum that is 0 only because ranges include 0 has no share either.

What is left out: the clamp of the zero point to [0, qmax]. It can bite only by rounding at the two ends, since a
range that includes 0 has -lo/s in [0, qmax] already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvgen.quant.affine import (
    clipped_range,
    qparams_from_range,
    qparams_to_rows,
    round_to_grid,
    scale_bounds,
    to_rows,
)
from qvgen.quant.grid import Grid


def _row_gradients(
    grad: Tensor, rows: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """Equations 1 to 3 in row layout; ds and dz keep the last dimension as 1."""
    unclamped = round_to_grid(rows, scale, zero_point, grid)
    codes = unclamped.clamp(grid.qmin, grid.qmax)
    in_range = unclamped == codes
    grad_x = torch.where(in_range, grad, 0.0)
    grad_scale = (grad * (codes - zero_point)).sum(-1, keepdim=True)
    grad_scale -= (grad_x * rows).sum(-1, keepdim=True) / scale
    grad_zero = (grad_x - grad).sum(-1, keepdim=True) * scale
    return grad_x, grad_scale, grad_zero


def fake_quantize_backward(
    grad: Tensor, x: Tensor, *, scale: Tensor, zero_point: Tensor, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`qvgen.quant.affine.fake_quantize` with a given (learned) scale and zero point.

    Args:
        grad: float32 [..., K], dLoss/dx^.
        x: [..., K], the input of the forward pass.
        scale: float32, public shape of :mod:`qvgen.quant.affine`.
        zero_point: float32, public shape: the value that the forward pass used (rounded for an integer grid).
        grid: The grid of the forward pass.

    Returns:
        dLoss/dx float32 [..., K], dLoss/dscale and dLoss/dzero_point in the shape of ``scale``. The zero
        point of a symmetric grid has the gradient 0.
    """
    rows, grad_rows = to_rows(x.float(), grid), to_rows(grad.float(), grid)
    row_scale, row_zero = qparams_to_rows(scale, grid), qparams_to_rows(zero_point, grid)
    grad_x, grad_scale, grad_zero = _row_gradients(grad_rows, rows, row_scale, row_zero, grid)
    if grid.symmetric:
        grad_zero = torch.zeros_like(grad_zero)
    return grad_x.reshape(x.shape), grad_scale.reshape(scale.shape), grad_zero.reshape(scale.shape)


def dynamic_fake_quantize_backward(
    grad: Tensor, x: Tensor, *, clip_low: Tensor, clip_high: Tensor, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``fake_quantize(x, *choose_qparams(x, clip_low, clip_high))``.

    Args:
        grad: float32 [..., K], dLoss/dx^.
        x: [..., K], the input of the forward pass.
        clip_low: float32 [..., 1], the factors that the forward pass used, one per row (token).
        clip_high: float32 [..., 1].
        grid: per_token or per_group.

    Returns:
        dLoss/dx float32 [..., K], dLoss/dclip_low and dLoss/dclip_high float32 [..., 1] (summed over groups;
        ``clip_low`` of a symmetric grid has the gradient 0).
    """
    rows, grad_rows = to_rows(x.float(), grid), to_rows(grad.float(), grid)
    c_low, c_high = qparams_to_rows(clip_low, grid), qparams_to_rows(clip_high, grid)
    low, high = clipped_range(rows, grid=grid, clip_low=c_low, clip_high=c_high)
    scale, zero_point = qparams_from_range(low, high, grid)
    grad_x, grad_scale, grad_zero = _row_gradients(grad_rows, rows, scale, zero_point, grid)
    if grid.symmetric:
        grad_low = torch.zeros_like(grad_scale)
        grad_high = _where_free(high, grad_scale / grid.qmax, grid)
        top = rows.abs().amax(-1, keepdim=True)
        grad_x = grad_x + _share(rows.abs() == top, grad_high * c_high) * rows.sign()
        grad_c_low, grad_c_high = grad_low, grad_high * top
    else:
        grad_scale = grad_scale + grad_zero * low / (scale * scale)
        grad_high = _where_free(high - low, grad_scale / grid.qmax, grid)
        grad_low = -grad_zero / scale - grad_high
        bottom, top = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
        grad_x = grad_x + _share((rows == bottom) & (bottom < 0), grad_low * c_low)
        grad_x = grad_x + _share((rows == top) & (top > 0), grad_high * c_high)
        grad_c_low, grad_c_high = grad_low * bottom.clamp(max=0.0), grad_high * top.clamp(min=0.0)
    return grad_x.reshape(x.shape), _sum_groups(grad_c_low, grid), _sum_groups(grad_c_high, grid)


def _where_free(span: Tensor, grad: Tensor, grid: Grid) -> Tensor:
    """Zero where the scale sits on its floor or ceiling: there it no longer depends on the range."""
    floor, ceiling = scale_bounds(grid)
    scale = span / grid.qmax
    return torch.where((scale > floor) & (scale < ceiling), grad, 0.0)


def _share(mask: Tensor, value: Tensor) -> Tensor:
    """Spread value [..., 1] evenly over the true elements of mask [..., columns]."""
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(mask, value / count, 0.0)


def _sum_groups(grad: Tensor, grid: Grid) -> Tensor:
    return grad.squeeze(-1).sum(-1, keepdim=True) if grid.granularity == "per_group" else grad
