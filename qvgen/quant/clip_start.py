"""Where learned clips of activations start: the share of a row's range that a grid covers, in (0, 1).

A row's range grows with its length, the spread of its values does not: of 64 Gaussian values the largest is 2.4 standard
deviations, of 16 384 it is 4.0. With few levels a smaller step is worth the values that are cut off, the more of the range is
tail: the share that loses least falls with the columns K and rises with the bits. :data:`TABLE` holds it for three kinds of
inputs; ``qvgen benchmark clips`` makes it again, with what it gains (docs/benchmarks/clips-tiny.md). Where inputs were
sampled, :func:`search_clips` finds both ends of a layer by the error of its own output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qvgen.quant.affine import choose_qparams, fake_quantize, row_extremes, to_rows
from qvgen.quant.grid import Grid

InputKind = Literal["gaussian", "gelu", "silu", "bounded"]
"""How a layer's inputs are distributed: Gaussian (norms, rotations), GELU or SiLU of it, or sines, which have no tail."""

MAX_CLIP = 0.999
"""Clips are sigmoids: 1 itself has no logit."""

COLUMNS = (64, 256, 1024, 4096, 16384)
"""Lengths of a row that :data:`TABLE` has entries for; between them clips are linear in the logarithm of the length."""

TABLE: dict[tuple[str, bool], dict[int, tuple[float, ...]]] = {
    ("gaussian", False): {
        2: (0.66, 0.56, 0.48, 0.43, 0.40),
        3: (0.86, 0.74, 0.65, 0.58, 0.53),
        4: (0.96, 0.88, 0.79, 0.71, 0.64),
        5: (0.989, 0.96, 0.90, 0.81, 0.75),
        6: (0.999, 0.989, 0.96, 0.91, 0.84),
        7: (0.999, 0.999, 0.989, 0.97, 0.92),
        8: (0.999, 0.999, 0.999, 0.989, 0.97),
    },
    ("gaussian", True): {
        2: (0.47, 0.40, 0.35, 0.32, 0.30),
        3: (0.76, 0.65, 0.57, 0.52, 0.47),
        4: (0.92, 0.82, 0.73, 0.66, 0.60),
        5: (0.979, 0.93, 0.85, 0.77, 0.71),
        6: (0.999, 0.979, 0.94, 0.88, 0.80),
        7: (0.999, 0.999, 0.979, 0.94, 0.88),
        8: (0.999, 0.999, 0.999, 0.979, 0.95),
    },
    ("gelu", False): {
        2: (0.77, 0.66, 0.57, 0.52, 0.48),
        3: (0.91, 0.82, 0.74, 0.66, 0.60),
        4: (0.97, 0.91, 0.81, 0.74, 0.67),
        5: (0.989, 0.979, 0.94, 0.94, 0.92),
        6: (0.999, 0.999, 0.979, 0.94, 0.91),
        7: (0.999, 0.999, 0.999, 0.979, 0.979),
        8: (0.999, 0.999, 0.999, 0.999, 0.989),
    },
    ("silu", False): {
        2: (0.73, 0.62, 0.53, 0.48, 0.44),
        3: (0.89, 0.76, 0.67, 0.60, 0.56),
        4: (0.97, 0.95, 0.92, 0.84, 0.76),
        5: (0.989, 0.979, 0.95, 0.95, 0.90),
        6: (0.999, 0.999, 0.979, 0.96, 0.96),
        7: (0.999, 0.999, 0.999, 0.989, 0.979),
        8: (0.999, 0.999, 0.999, 0.999, 0.999),
    },
}
"""(kind, symmetric) -> bits -> clip at each of :data:`COLUMNS`; all kinds with a tail are Gaussian to symmetric grids."""

CANDIDATES = (*(round(0.2 + 0.05 * i, 2) for i in range(15)), 0.925, 0.95, 0.975, 0.99, MAX_CLIP)
"""Clips that the search tries."""

MAX_ROWS, MAX_OUTPUTS = 512, 128
"""Inputs that the search looks at, and combinations of a layer's outputs that it measures their errors on."""

Clips = tuple[float, float]
"""Factor of a row's minimum and of its maximum."""


def initial_clip(grid: Grid, *, columns: int, kind: InputKind = "gaussian") -> float:
    """The clip of :data:`TABLE` for inputs that nobody has seen.

    Args:
        grid: Grid of the activations; in a grid of groups a group is a row.
        columns: in_features of the layer.
        kind: How its inputs are distributed.

    Example:
        >>> paper = Grid(bits=4, granularity="per_token")
        >>> tuple(round(initial_clip(paper, columns=k), 3) for k in (32, 64, 128, 1920, 8960, 100_000))
        (0.96, 0.96, 0.92, 0.754, 0.67, 0.64)
    """
    if kind == "bounded":
        return MAX_CLIP
    row = TABLE["gaussian" if grid.symmetric else kind, grid.symmetric][grid.bits]
    place = math.log(max(grid.group_size or columns, 1), 4) - math.log(COLUMNS[0], 4)
    place = min(max(place, 0.0), len(COLUMNS) - 1.0)
    lower = min(int(place), len(COLUMNS) - 2)
    share = place - lower
    return row[lower] * (1 - share) + row[lower + 1] * share


def search_clips(rows: Float[Tensor, "n K"], weights: Sequence[Float[Tensor, "N K"]], *, grid: Grid) -> Clips:
    """The clips with the least error |(Q(x) - x) W^T|^2 of layers that read the same input.

    Both ends are moved together first, then one after the other until neither gains.

    Args:
        rows: Inputs as they are quantized (rotated, smoothed), float32; the first :data:`MAX_ROWS` count.
        weights: The layers' full-precision weights in the same coordinates.
        grid: Grid of the activations.

    Returns:
        The two factors, equal for symmetric grids.
    """
    rows = rows[:MAX_ROWS].float()
    outputs = torch.cat([_sketch(weight) for weight in weights])
    extremes = row_extremes(to_rows(rows, grid), grid)
    cached: dict[Clips, float] = {}

    def error(clips: Clips) -> float:
        if clips not in cached:
            cached[clips] = output_error(rows, outputs, clips, grid, extremes=extremes)
        return cached[clips]

    best = min(((clip, clip) for clip in reversed(CANDIDATES)), key=error)
    if grid.symmetric:
        return best
    while True:
        before = best
        for side in (0, 1):
            best = _moved(best, side, error)
        if best == before:
            return best


def output_error(
    rows: Tensor, outputs: Tensor | None, clips: Clips, grid: Grid, *, extremes: tuple[Tensor, Tensor] | None = None
) -> float:
    """Sum of squares of the errors that quantizing rows [n, K] makes.

    Args:
        rows: float32, per token.
        outputs: Weights [r, K] whose products with the errors count; None: the errors themselves.
        clips: Factors of both ends.
        grid: Grid of the activations.
        extremes: The rows' :func:`~qvgen.quant.affine.row_extremes`, where they are known.
    """
    low, high = (torch.full((len(rows), 1), clip, device=rows.device) for clip in clips)
    scale, zero_point = choose_qparams(rows, grid=grid, clip_low=low, clip_high=high, extremes=extremes)
    lost = fake_quantize(rows, scale=scale, zero_point=zero_point, grid=grid).sub_(rows)
    return float((lost if outputs is None else lost @ outputs.mT).square().sum(1).cpu().double().sum())


def _moved(clips: Clips, side: int, error: Callable[[Clips], float]) -> Clips:
    """The clips with one end moved to where the error is least; ``clips`` where no other place is better."""
    ends = [clips, *((c, clips[1]) if side == 0 else (clips[0], c) for c in CANDIDATES)]
    return min(ends, key=error)


def _sketch(weight: Tensor) -> Tensor:
    """At most MAX_OUTPUTS random combinations of a layer's outputs, [r, K]: their errors add up to all outputs', in the mean.

    Signs are drawn anew for every call from the same seed, so that the same layer gives the same clips on every machine.
    """
    weight = weight.detach().float()
    if len(weight) <= MAX_OUTPUTS:
        return weight
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (MAX_OUTPUTS, len(weight)), generator=generator).float().mul_(2).sub_(1)
    return signs.to(weight.device) @ weight / math.sqrt(MAX_OUTPUTS)
