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
ceiling, ds ends there; a minimum that is 0 only because ranges include 0 has no share either. The QVGen release rounds z
without a straight-through path: there dz = 0 in these lines (``through_zero_point=False``).

Where the codes are made with a scale that was not rounded yet (arithmetic ``unrounded``), s in these lines is that scale.

What is left out: the clamp of the zero point to [0, qmax]. It can bite only by rounding at the two ends, since a
range that includes 0 has -lo/s in [0, qmax] already. And of real zero points the floor of the scale beside a row's offset.

Selections are not written with ``torch.where``: on a CPU it takes three to ten times as long as a vectorized pass, and so
does a comparison that makes bools. ``hardtanh_backward(v, x, a, b)`` is v where a < x < b and 0 elsewhere in one such pass,
bit for bit (x is never NaN here), and ``eq`` into floats is 1 and 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qvgen.quant.affine import (
    Rounded,
    clipped_range,
    from_rows,
    qparams_from_range,
    qparams_to_rows,
    round_rows,
    row_extremes,
    scale_bounds,
    to_rows,
)
from qvgen.quant.grid import Grid


def _select_between(value: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """The value where low < x < high, and 0 elsewhere."""
    selected: Tensor = torch.ops.aten.hardtanh_backward.default(value, x, low, high)
    return selected


def _row_gradients(grad: Tensor, rounded: Rounded, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Equations 1 to 3 in row layout; ds and dz keep the last dimension as 1. dz of a symmetric grid is 0."""
    assert rounded.unclamped is not None, "a backward pass needs the codes before the clamp"
    # Unclamped codes are whole numbers: in [qmin, qmax] is between the halves beside it.
    grad_x = _select_between(grad, rounded.unclamped, grid.qmin - 0.5, grid.qmax + 0.5)
    products = grad * rounded.centered
    grad_scale = products.sum(-1, keepdim=True)
    grad_scale -= torch.mul(grad_x, rounded.rows, out=products).sum(-1, keepdim=True) / rounded.divisor
    if grid.symmetric:
        return grad_x, grad_scale, torch.zeros_like(grad_scale)
    grad_zero = torch.sub(grad_x, grad, out=products).sum(-1, keepdim=True) * rounded.scale
    return grad_x, grad_scale, grad_zero


def fake_quantize_backward(
    grad: Tensor, x: Tensor, *, scale: Tensor, zero_point: Tensor, grid: Grid, rounded: Rounded | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`qvgen.quant.affine.fake_quantize` with a given (learned) scale and zero point.

    Args:
        grad: float32 [..., K], dLoss/dx^.
        x: [..., K], the input of the forward pass.
        scale: float32, public shape of :mod:`qvgen.quant.affine`.
        zero_point: float32, public shape: the value that the forward pass used (rounded for an integer grid).
        grid: The grid of the forward pass.
        rounded: :func:`qvgen.quant.affine.round_rows` of x with these, where it is known; None: it is computed.

    Returns:
        dLoss/dx float32 [..., K], dLoss/dscale and dLoss/dzero_point in the shape of ``scale``. The zero
        point of a symmetric grid has the gradient 0.
    """
    if rounded is None:
        rounded = round_rows(x.float(), scale=scale, zero_point=zero_point, grid=grid)
    grad_x, grad_scale, grad_zero = _row_gradients(to_rows(grad.float(), grid), rounded, grid)
    return grad_x.reshape(x.shape), grad_scale.reshape(scale.shape), grad_zero.reshape(scale.shape)


def dynamic_fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    *,
    clips: tuple[Tensor, Tensor],
    grid: Grid,
    extremes: tuple[Tensor, Tensor] | None = None,
    rounded: Rounded | None = None,
    through_zero_point: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``fake_quantize(x, *choose_qparams(x, clip_low, clip_high))``.

    Args:
        grad: float32 [..., K], dLoss/dx^.
        x: [..., K], the input of the forward pass.
        clips: float32 [..., 1] each, the factors that the forward pass used on minimum and maximum, one per row (token).
        grid: per_token or per_group.
        extremes: :func:`qvgen.quant.affine.row_extremes` of x in row layout, where they are known; None: they are computed.
        rounded: :func:`qvgen.quant.affine.round_rows` of x with what those and the clips give, where it is known.
        through_zero_point: Whether the range is moved by what the zero point's gradient asks for, too; False: the zero point
            is a constant to the gradient.

    Returns:
        dLoss/dx float32 [..., K], dLoss/dclip_low and dLoss/dclip_high float32 [..., 1] (summed over groups;
        ``clip_low`` of a symmetric grid has the gradient 0).
    """
    rows, grad_rows = to_rows(x.float(), grid), to_rows(grad.float(), grid)
    bottom, top = row_extremes(rows, grid) if extremes is None else extremes
    c_low, c_high = (qparams_to_rows(clip, grid) for clip in clips)
    low, high = clipped_range(rows, grid=grid, clip_low=c_low, clip_high=c_high, extremes=(bottom, top))
    if rounded is None:
        scale, zero_point = (from_rows(value, grid) for value in qparams_from_range(low, high, grid))
        rounded = round_rows(x.float(), scale=scale, zero_point=zero_point, grid=grid)
    scale = rounded.scale
    grad_x, grad_scale, grad_zero = _row_gradients(grad_rows, rounded, grid)
    if grid.symmetric:
        grad_low = torch.zeros_like(grad_scale)
        grad_high = _where_free(high, grad_scale / grid.qmax, grid)
        grad_x.add_(_share(rows.abs(), top, grad_high * c_high).mul_(rows.sign()))
        grad_c_low, grad_c_high = grad_low, grad_high * top
    else:
        if not through_zero_point:
            grad_zero = torch.zeros_like(grad_zero)
        grad_scale = grad_scale + grad_zero * low / (scale * scale)
        grad_high = _where_free(high - low, grad_scale / grid.qmax, grid)
        grad_low = -grad_zero / scale - grad_high
        of_bottom, of_top = grad_low * c_low, grad_high * c_high
        bottom_end, top_end = bottom, top
        if grid.zero_point == "integer":
            # A minimum that is 0 or above has no share, nor has a maximum that is 0 or below.
            of_bottom = _select_between(of_bottom, bottom, -math.inf, 0.0)
            of_top = _select_between(of_top, top, 0.0, math.inf)
            bottom_end, top_end = bottom.clamp(max=0.0), top.clamp(min=0.0)
        grad_x.add_(_share(rows, bottom, of_bottom)).add_(_share(rows, top, of_top))
        grad_c_low, grad_c_high = grad_low * bottom_end, grad_high * top_end
    return grad_x.reshape(x.shape), _sum_groups(grad_c_low, grid), _sum_groups(grad_c_high, grid)


def _where_free(span: Tensor, grad: Tensor, grid: Grid) -> Tensor:
    """Zero where the scale sits on its floor or ceiling: there it no longer depends on the range."""
    floor, ceiling = scale_bounds(grid)
    scale = span / grid.qmax
    return _select_between(grad, scale, floor, ceiling)


def _share(rows: Tensor, extreme: Tensor, value: Tensor) -> Tensor:
    """Spread value [..., 1] evenly over those elements of rows [..., columns] that equal the extreme [..., 1]."""
    hit = torch.eq(rows, extreme, out=torch.empty_like(rows))
    count = hit.sum(-1, keepdim=True).clamp(min=1)  # exact: fewer than 2^24 columns
    return _select_between(value / count, hit, 0.5, 2.0)


def _sum_groups(grad: Tensor, grid: Grid) -> Tensor:
    return grad.squeeze(-1).sum(-1, keepdim=True) if grid.granularity == "per_group" else grad
