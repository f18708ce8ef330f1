"""The grid arithmetic: choose_qparams, quantize, dequantize, fake_quantize. Nothing else in qvgen rounds to a grid.

For a row x (over the last dimension, or one group of it), in float32 whatever the input's dtype:

    asymmetric   lo = min(x, 0) * clip_low,  hi = max(x, 0) * clip_high,  s = max((hi - lo) / qmax, 1e-8)
                 z = clamp(rne(-lo * (1/s)), 0, qmax)             [integer]    or    -lo * (1/s)  [real, see below]
                 q = clamp(rne(x * (1/s)) + z, 0, qmax)           [integer]    or    clamp(rne(x * (1/s) + z), 0, qmax)
    symmetric    s = max(max|x| * clip_high / qmax, 1e-8),   q = clamp(rne(x * (1/s)), -qmax, qmax)
    both         x ~ s * (q - z)

Two more arithmetics of symmetric rows are those of other people's kernels (``Grid.arithmetic``), in the same notation:

    division     s = max(max|x| * clip_high, 1e-10) / qmax,   q = clamp(rne(x / s), -qmax, qmax)
    unrounded    r = max(max|x| * clip_high * (1/qmax), 1e-8),   q = clamp(rne(x * (1/r)), -qmax, qmax),   s = r, rounded

The scale that functions here take and return is r in the last case, and codes are multiplied by :func:`dequantizing_scale`.

The order of operations is part of the definition: 1/s is one IEEE division and then a multiplication, because
x / s flips 0.3-0.4 % of the codes; nothing is fused; rne rounds halves to even. The packed kernels do the same, and
``fake_quantize(x) == dequantize(quantize(x))`` holds bit for bit. bfloat16 arithmetic would flip 1.4 % of 4-bit
codes, so the only cast is the caller's, at the border.

Ranges include 0, so that a zero stays an exact zero and a one-sided row needs no zero point outside of its codes, which are
stored in as many bits. With a real zero point neither is a reason: it moves zeros by up to s/2 anyway and is a float. There
lo = min(x) * clip_low and hi = max(x) * clip_high, as in the QVGen release, s is |lo| / 2^16 at least (so that x * (1/s) + z
keeps its fraction in float32), and z is clamped to +-2^17 only. A row that contains 0 has the same bits either way. Codes
of asymmetric grids are uint8, of symmetric ones int8.

Shapes: for x [..., K] the scale and zero point are [..., 1] (per_token, per_channel), [..., K / group_size]
(per_group) or [1] (per_tensor).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qvgen.quant.grid import MIN_SCALE, MIN_SPAN, Grid

MAX_REAL_ZERO_POINT = 2.0**17
"""Largest magnitude of a real zero point: float32 has 2^-6 of a code left beside it."""

MIN_SHARE_OF_OFFSET = 2.0**-16
"""A scale is at least this share of its row's distance from 0, where zero points are real; a row that contains 0 has more."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rounded:
    """Rows that were rounded to a grid, all in the layout of :func:`to_rows`: what a backward pass needs of them.

    Attributes:
        rows: float32 [..., columns], what was rounded.
        scale: float32 [..., 1], what codes are multiplied by.
        divisor: float32 [..., 1], what rows were divided by: the scale, of ``unrounded`` arithmetic before its rounding.
        zero_point: float32 [..., 1].
        unclamped: float32 [..., columns], whole numbers: the codes before the clamp to [qmin, qmax]; None where the memory
            was saved.
        centered: float32 [..., columns], clamped codes minus the zero point.
    """

    rows: Tensor
    scale: Tensor
    divisor: Tensor
    zero_point: Tensor
    unclamped: Tensor | None
    centered: Tensor


def to_rows(x: Tensor, grid: Grid) -> Tensor:
    """View x float32 [..., K] so that what shares a scale is the last dimension.

    Returns:
        per_token, per_channel: x itself; per_group: [..., G, group_size]; per_tensor: [1, numel].
    """
    if grid.granularity == "per_group":
        groups: Tensor = x.unflatten(-1, (grid.num_groups(x.shape[-1]), -1))
        return groups
    if grid.granularity == "per_tensor":
        return x.reshape(1, -1)
    return x


def qparams_to_rows(value: Tensor, grid: Grid) -> Tensor:
    """Give a scale, zero point or clip factor of the public shape the trailing 1 that :func:`to_rows` needs."""
    return value.unsqueeze(-1) if grid.granularity in ("per_group", "per_tensor") else value


def from_rows(qparam: Tensor, grid: Grid) -> Tensor:
    """Inverse of :func:`qparams_to_rows`."""
    return qparam.squeeze(-1) if grid.granularity in ("per_group", "per_tensor") else qparam


def row_extremes(rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each row, or (symmetric) -max|x| and max|x|; float32 [..., 1] each."""
    if grid.symmetric:
        top = rows.abs().amax(-1, keepdim=True)
        return -top, top
    return rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)


def clipped_range(
    rows: Tensor,
    *,
    grid: Grid,
    clip_low: Tensor | None = None,
    clip_high: Tensor | None = None,
    extremes: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Lower and upper end of each row's range, 0 included (but for real zero points), times the clip factors.

    Args:
        rows: float32 [..., columns], as :func:`to_rows` returns it.
        grid: A symmetric grid uses (-max|x|, max|x|) and ``clip_high`` alone.
        clip_low: Factor in (0, 1] on the minimum, broadcastable to [..., 1].
        clip_high: Factor in (0, 1] on the maximum.
        extremes: The rows' :func:`row_extremes`, where they are known; None: they are taken from the rows.

    Returns:
        lo <= 0 and hi >= 0, float32 [..., 1]; of grids with a real zero point lo <= hi (clips aside).
    """
    bottom, top = row_extremes(rows, grid) if extremes is None else extremes
    if grid.symmetric:
        high = top if clip_high is None else top * clip_high
        return -high, high
    low, high = (bottom, top) if grid.zero_point == "real" else (bottom.clamp(max=0.0), top.clamp(min=0.0))
    return low if clip_low is None else low * clip_low, high if clip_high is None else high * clip_high


def qparams_from_range(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the range [low, high], both float32 and of the range's shape.

    The zero point of a symmetric grid is 0. Scales are rounded to ``grid.scale_dtype`` before the zero point
    is derived from them.
    """
    span = high if grid.symmetric else high - low
    # A divisor on the device: CUDA would multiply by the reciprocal of a Python number, which rounds differently.
    qmax = span.new_full((), grid.qmax)
    if grid.arithmetic == "division":
        return span.clamp(min=MIN_SPAN) / qmax, torch.zeros_like(span)
    if grid.arithmetic == "unrounded":
        return (span * qmax.reciprocal()).clamp(min=MIN_SCALE), torch.zeros_like(span)
    scale = (span / qmax).clamp(min=MIN_SCALE)
    if grid.zero_point == "real":
        scale = torch.maximum(scale, low.abs() * MIN_SHARE_OF_OFFSET)
    scale = round_scale(scale, grid)
    if grid.symmetric:
        return scale, torch.zeros_like(scale)
    zero_point = -low * scale.reciprocal()
    if grid.zero_point == "real":
        free = usable_zero_point(zero_point, grid)
        return scale, torch.where((low <= 0) & (high >= 0), zero_point.clamp(0, grid.qmax), free)
    return scale, usable_zero_point(zero_point, grid)


def usable_zero_point(zero_point: Tensor, grid: Grid) -> Tensor:
    """A zero point as an asymmetric grid uses it: a code (integer), or so near to 0 that codes keep a fraction beside it."""
    if grid.zero_point == "integer":
        return zero_point.round().clamp(0, grid.qmax)
    return zero_point.clamp(-MAX_REAL_ZERO_POINT, MAX_REAL_ZERO_POINT)


def round_scale(scale: Tensor, grid: Grid) -> Tensor:
    """Nearest value of ``grid.scale_dtype``, as float32, never below its floor or above its largest number.

    float16 has no 1e-8 (it would become 0 and 1/scale infinite): its smallest normal number stands in.
    """
    if grid.torch_scale_dtype == torch.float32:
        return scale
    floor, ceiling = scale_bounds(grid)
    return scale.to(grid.torch_scale_dtype).float().clamp(min=floor, max=ceiling)


def dequantizing_scale(scale: Tensor, grid: Grid) -> Tensor:
    """The scale that codes are multiplied by: rounded to ``grid.scale_dtype``, which only ``unrounded`` has not done yet."""
    return round_scale(scale, grid) if grid.arithmetic == "unrounded" else scale


def scale_bounds(grid: Grid) -> tuple[float, float]:
    """Smallest and largest scale of a grid."""
    if grid.arithmetic == "division":
        return MIN_SPAN / grid.qmax, float(torch.finfo(torch.float32).max)
    info = torch.finfo(grid.torch_scale_dtype)
    return max(MIN_SCALE, float(info.smallest_normal)), float(info.max)


def choose_qparams(
    x: Tensor,
    *,
    grid: Grid,
    clip_low: Tensor | None = None,
    clip_high: Tensor | None = None,
    extremes: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point from the (clipped) minimum and maximum of x.

    Args:
        x: [..., K], any float dtype.
        grid: Where the codes lie.
        clip_low: Factor on the minimum, broadcastable to the scale's shape ([..., 1] for groups).
        clip_high: Factor on the maximum.
        extremes: See :func:`clipped_range`.

    Returns:
        scale float32 > 0 and zero_point float32 (whole numbers for an integer grid), see the module's shapes.
    """
    rows = to_rows(x.float(), grid)
    clips = [None if clip is None else qparams_to_rows(clip.float(), grid) for clip in (clip_low, clip_high)]
    low, high = clipped_range(rows, grid=grid, clip_low=clips[0], clip_high=clips[1], extremes=extremes)
    scale, zero_point = qparams_from_range(low, high, grid)
    return from_rows(scale, grid), from_rows(zero_point, grid)


def round_to_grid(rows: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Codes as whole float32 numbers, before the clamp to [qmin, qmax]. All arguments in row layout."""
    scaled = rows / scale if grid.arithmetic == "division" else rows * scale.reciprocal()
    # In place from here on: nobody else has this tensor, and a pass over fresh memory takes twice the time.
    if grid.zero_point == "real":
        return scaled.add_(zero_point).round_().add_(0.0)  # makes -0.0 a plain zero: integer codes have no sign of zero
    return scaled.round_().add_(zero_point)


def round_rows(x: Tensor, *, scale: Tensor, zero_point: Tensor, grid: Grid, with_unclamped: bool = True) -> Rounded:
    """Round x float32 [..., K] with a scale and zero point of the public shape, and keep what a backward pass needs."""
    rows, scale, zero_point = to_rows(x, grid), qparams_to_rows(scale, grid), qparams_to_rows(zero_point, grid)
    unclamped = round_to_grid(rows, scale, zero_point, grid)
    clamp = torch.clamp if with_unclamped else torch.clamp_
    centered = clamp(unclamped, grid.qmin, grid.qmax).sub_(zero_point)
    return Rounded(
        rows=rows,
        scale=dequantizing_scale(scale, grid),
        divisor=scale,
        zero_point=zero_point,
        unclamped=unclamped if with_unclamped else None,
        centered=centered,
    )


def quantize(x: Tensor, *, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Codes of x.

    Args:
        x: [..., K], any float dtype.
        scale: float32, public shape (see the module).
        zero_point: float32, public shape; ignored content (zeros) for a symmetric grid.
        grid: Where the codes lie.

    Returns:
        uint8 (asymmetric) or int8 (symmetric) [..., K]. A NaN has no code: callers keep NaNs out.
    """
    rows = to_rows(x.float(), grid)
    codes = round_to_grid(rows, qparams_to_rows(scale, grid), qparams_to_rows(zero_point, grid), grid)
    codes = codes.clamp_(grid.qmin, grid.qmax)
    return codes.to(torch.int8 if grid.symmetric else torch.uint8).reshape(x.shape)


def dequantize(codes: Tensor, *, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """float32 [..., K] values ``scale * (codes - zero_point)``: exact inverse of :func:`quantize` on the grid."""
    rows = to_rows(codes.float(), grid)
    values = dequantizing_scale(qparams_to_rows(scale, grid), grid) * (rows - qparams_to_rows(zero_point, grid))
    return values.reshape(codes.shape)


def fake_quantize(x: Tensor, *, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Nearest grid value of every element: float32 [..., K], bitwise ``dequantize(quantize(x))``.

    In range the error is at most scale / 2 (plus scale / 2 for an integer zero point at the two ends). No
    gradient is defined here: :mod:`qvgen.quant.ste` has the straight-through one.
    """
    rows = to_rows(x.float(), grid)
    row_scale, row_zero = qparams_to_rows(scale, grid), qparams_to_rows(zero_point, grid)
    codes = round_to_grid(rows, row_scale, row_zero, grid).clamp_(grid.qmin, grid.qmax)
    return codes.sub_(row_zero).mul_(dequantizing_scale(row_scale, grid)).reshape(x.shape)
