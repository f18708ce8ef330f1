"""Balancing a Linear's input channels against its weight columns, so that outliers of the input quantize less badly.

X W^T = (X m)(W / m)^T for any positive m [K]. One convention here: m, the *input scale*, is what X is MULTIPLIED
with, and the weight is divided by it. With a_j = max|X_j| and w_j = max|W_j| over channel j:

    SmoothQuant (arXiv 2211.10438, Eq. 4)    s_j = a_j^alpha / w_j^(1-alpha), X / s, W s      m_j = 1 / s_j
    ViDiT-Q (arXiv 2406.02540)               m_j = w_j^beta / a_j^(1-beta)                    beta = 1 - alpha

They are one family, m_j = w_j^(1-alpha) / a_j^alpha: alpha = 1 makes all input channels equal, alpha = 0 all weight
columns. ViDiT-Q's 0.56 (W4A8) and 0.75 (W8A8) are alpha = 0.44 and 0.25.

Two things differ from the papers. The factors are divided by their median: a common factor changes no result (it goes
into the scales of both grids), and the middle channel then keeps its unit, whatever one extreme channel does (a mean
would follow that one). And they are bounded to 1e-4 .. 1e4, and no channel counts as quieter than a tenth of the median
one: the maxima come from a finite sample, and a channel that was almost silent in it must not be blown up when it speaks
later.

A dead channel (a maximum that is 0 or not finite, on either side) has factor 1 and no part in the median.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qvgen.config.schema.value_range import Range
from qvgen.quant.affine import choose_qparams, fake_quantize
from qvgen.quant.grid import Grid
from qvgen.quant.precision import to_float64

ALPHA = Range("[0, 1]", write="0.5")
"""Range of alpha, which shares the outliers out between input and weight."""

MAX_FACTOR = 1e4
"""Largest factor, and the inverse of the smallest, after the division by the median."""

SILENCE = 0.1
"""Share of the median channel's maximum below which a channel counts as that loud: one that was nearly silent in the
calibration must not be blown up, or it drowns all others when it speaks."""

ALPHAS = (None, *(index / 20 for index in range(21)))
"""Candidates of the search: no smoothing, 0, 0.05, ..., 1."""


def smoothing_scale(activation_abs_max: Tensor, weight: Tensor, *, alpha: float) -> Tensor:
    """The factors that the input is multiplied with and the weight's columns are divided by.

    Args:
        activation_abs_max: [K], largest |x| of each input channel over a calibration sample.
        weight: [N, K], or the largest |w| of each of its columns [K].
        alpha: 0 to 1, how much of the input's range moves into the weight (SmoothQuant's alpha, 1 - ViDiT-Q's).

    Returns:
        m float32 [K] in [1e-4, 1e4]; relative error 1e-7 (computed in float64, since a^alpha of float32's ends has
        no float32 quotient).

    Raises:
        ValueError: ``alpha`` outside [0, 1], or shapes that don't fit.
    """
    ALPHA.check(alpha, key="alpha")
    if activation_abs_max.dim() != 1 or weight.dim() not in (1, 2) or weight.shape[-1] != activation_abs_max.shape[0]:
        raise ValueError(
            f"activation_abs_max {list(activation_abs_max.shape)} and weight {list(weight.shape)} don't fit; "
            "give [K] and [N, K] or [K]"
        )
    a = to_float64(activation_abs_max)
    seen = a[a.isfinite() & (a > 0)]
    if seen.numel():
        a = torch.where(a > 0, a.clamp(min=SILENCE * float(seen.median())), a)
    w = to_float64(weight.abs().amax(0) if weight.dim() == 2 else weight)
    live = a.isfinite() & w.isfinite() & (a > 0) & (w > 0)
    factor = torch.ones_like(a)
    if live.any():
        log_factor = (1.0 - alpha) * w[live].log() - alpha * a[live].log()
        log_factor -= log_factor.median()  # the lower one of two middles: torch's, and always a channel's own
        factor[live] = log_factor.exp().clamp(1.0 / MAX_FACTOR, MAX_FACTOR)
    return factor.float().to(weight.device)


def output_error(
    inputs: Tensor,
    weight: Tensor,
    *,
    input_scale: Tensor,
    weight_grid: Grid,
    activation_grid: Grid,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """|Q(T(X m)) Q(T(W / m))^T - X W^T|^2 / |X W^T|^2 with the plain minimum and maximum as ranges.

    Args:
        inputs: X [n, K], sample rows.
        weight: W [N, K].
        input_scale: m [K].
        weight_grid: per_channel or per_group.
        activation_grid: Any granularity.
        transform: T, an orthogonal transform of the last dimension that the layer applies after the factors (its
            rotation); None for none.

    Returns:
        The relative error, summed in float64; 0 where X W^T is 0 and met exactly, infinite where it is 0 and missed.
    """
    x, w = inputs.float(), weight.float()
    exact = x @ w.mT
    sides = []
    for side, grid in ((x * input_scale, activation_grid), (w / input_scale, weight_grid)):
        turned = side if transform is None else transform(side)
        scale, zero_point = choose_qparams(turned, grid=grid)
        sides.append(fake_quantize(turned, scale=scale, zero_point=zero_point, grid=grid))
    error = to_float64(sides[0] @ sides[1].mT - exact).square().sum().item()
    size = to_float64(exact).square().sum().item()
    return error / size if size > 0 else (0.0 if error == 0 else float("inf"))


def search_alpha(
    inputs: Tensor,
    weight: Tensor,
    *,
    activation_abs_max: Tensor,
    weight_grid: Grid,
    activation_grid: Grid,
    transform: Callable[[Tensor], Tensor] | None = None,
    alphas: Sequence[float | None] = ALPHAS,
) -> tuple[Tensor, list[float]]:
    """The factors of the alpha with the least :func:`output_error` on a sample. The first of equal ones is kept.

    No value of alpha gives factors of 1, so no smoothing is a candidate of its own: on the sample nothing is made worse.

    Args:
        inputs: X [n, K], sample rows; a few hundred tell alphas apart.
        weight: W [N, K].
        activation_abs_max: [K], over the whole calibration (of which ``inputs`` may be a small part).
        weight_grid: per_channel or per_group.
        activation_grid: Any granularity.
        transform: See :func:`output_error`.
        alphas: Candidates, each 0 to 1, or None for no smoothing.

    Returns:
        m float32 [K], and the relative error of every candidate.

    Raises:
        ValueError: No candidates, or values that are not finite.
    """
    if not alphas:
        raise ValueError("alphas is empty; give at least one value in 0..1")
    if not (inputs.isfinite().all() and weight.isfinite().all()):
        raise ValueError("inputs or weight hold values that are not finite; leave those rows out of the sample")
    factors = [
        torch.ones_like(activation_abs_max, dtype=torch.float32)
        if alpha is None
        else smoothing_scale(activation_abs_max, weight, alpha=alpha)
        for alpha in alphas
    ]
    errors = [
        output_error(
            inputs,
            weight,
            input_scale=factor,
            weight_grid=weight_grid,
            activation_grid=activation_grid,
            transform=transform,
        )
        for factor in factors
    ]
    return factors[min(range(len(errors)), key=errors.__getitem__)], errors
