"""Intervals, tests and sample sizes of an evaluation, in float64; equal numbers give equal results.

The unit that is drawn is the prompt with all its seeds: videos of one prompt are alike, and to draw videos one by one would
make every interval too narrow. Of one prompt alone its seeds are drawn. The estimate is the mean over prompts of their means
over seeds.

    interval     bootstrap, percentiles of the means of RESAMPLES draws with replacement       Efron & Tibshirani 1993, 13.3;
                 whole clusters and no second stage below them                                Davison & Hinkley 1997, 3.8
    p            share of the assignments of signs to the prompts' mean differences whose mean is at least as far from 0:
                 all of them up to EXACT prompts, else ASSIGNMENTS drawn ones and the true one  Phipson & Smyth 2010
    settle       n = ((z_(1 - LEVEL/2) + z_POWER) s / d)^2 prompts: what a mean difference d of deviation s takes to be found
                 with probability POWER                                                       Cohen 1988, 2
    sets         delete-a-group jackknife over at most GROUPS groups of prompts: a bootstrap would draw videos twice, and
                 sets with doubles are farther apart                                          Shao & Tu 1995, 2.3

Few prompts make the bootstrap's intervals too narrow: beside Student's, of normal values, those of 20 prompts by a tenth
(1.96 (19 / 20)^(1/2) / 2.09) and those of 5 by more than a third.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float

CONFIDENCE = 0.95
RESAMPLES = 10_000
EXACT = 14
"""Most prompts of which all 2^n assignments of signs are counted."""

ASSIGNMENTS = 20_000
LEVEL, POWER = 0.05, 0.8
GROUPS = 40
_SEED = 20_240_229
_AT_ONCE = 500

Values = Float[np.ndarray, " n"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and its interval.

    Attributes:
        value: The mean over prompts.
        low: Lower end of the interval; None where there is too little to know it.
        high: Upper end.
    """

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two models on the same prompts and noises.

    Attributes:
        estimate: Mean of the differences, the first model's value less the second's.
        p: Probability of a mean at least as far from 0 if the two did not differ; None for a single prompt and seed.
        videos: Videos of each model with which a difference of this size would be found; None: none is seen.
    """

    estimate: Estimate
    p: float | None
    videos: int | None

    @property
    def is_settled(self) -> bool:
        """Whether it is more than noise."""
        return self.p is not None and self.p < LEVEL


def clusters(values: Sequence[float], prompts: Sequence[int]) -> Values:
    """The means that are drawn: of each prompt, in the order of their first videos; of a single prompt its values."""
    if len(set(prompts)) == 1:
        return np.asarray(values, dtype=np.float64)
    rows: dict[int, list[float]] = {}
    for value, prompt in zip(values, prompts, strict=True):
        rows.setdefault(prompt, []).append(value)
    return np.array([math.fsum(row) / len(row) for row in rows.values()])


def estimate(values: Sequence[float], prompts: Sequence[int]) -> Estimate:
    """Mean and bootstrap interval of one model's values.

    Args:
        values: One for each video, finite.
        prompts: The prompt of each video, by its number.
    """
    means = clusters(values, prompts)
    mean, count = _mean(means), len(means)
    if count < 2:
        return Estimate(value=mean, low=None, high=None)
    generator = np.random.Generator(np.random.PCG64(_SEED))
    parts = [
        means[generator.integers(0, count, size=(min(_AT_ONCE, RESAMPLES - start), count))].mean(1)
        for start in range(0, RESAMPLES, _AT_ONCE)
    ]
    low, high = np.quantile(np.concatenate(parts), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value=mean, low=float(low), high=float(high))


def difference(first: Sequence[float], second: Sequence[float], prompts: Sequence[int]) -> Difference:
    """How two models differ on the same videos.

    Args:
        first: One value for each video, finite.
        second: The other model's, in the same order.
        prompts: The prompt of each video, by its number.
    """
    values = [a - b for a, b in zip(first, second, strict=True)]
    means = clusters(values, prompts)
    return Difference(
        estimate=estimate(values, prompts),
        p=sign_test(means),
        videos=_videos(means, per_cluster=len(values) / len(means)),
    )


def sign_test(means: Values) -> float | None:
    """Probability of a mean at least as far from 0 if each difference could have either sign; None of a single one."""
    count = len(means)
    if count < 2:
        return None
    seen = abs(_mean(means)) * (1 - 1e-12)  # sums in another order are off in the last digits
    if count <= EXACT:
        signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
        return float(np.mean(np.abs(signs @ means) / count >= seen))
    generator = np.random.Generator(np.random.PCG64(_SEED))
    found = 0
    for start in range(0, ASSIGNMENTS, _AT_ONCE):
        signs = 1 - 2 * generator.integers(0, 2, size=(min(_AT_ONCE, ASSIGNMENTS - start), count))
        found += int(np.sum(np.abs(signs @ means) / count >= seen))
    return (found + 1) / (ASSIGNMENTS + 1)


def _videos(means: Values, *, per_cluster: float) -> int | None:
    size = abs(_mean(means))
    if len(means) < 2 or size == 0.0:
        return None
    deviation = float(np.std(means, ddof=1))
    quantiles = NormalDist().inv_cdf(1 - LEVEL / 2) + NormalDist().inv_cdf(POWER)
    return math.ceil(max(2.0, (quantiles * deviation / size) ** 2) * per_cluster)


def set_estimate(distance: Callable[[Sequence[int]], float], prompts: Sequence[int]) -> Estimate:
    """A distance of sets and its jackknife interval.

    Args:
        distance: (numbers of the videos that count) -> the distance.
        prompts: The prompt of each video, by its number; of one prompt alone each video is left out by itself.
    """
    whole = distance(range(len(prompts)))
    units = list(range(len(prompts))) if len(set(prompts)) == 1 else list(prompts)
    names = list(dict.fromkeys(units))
    groups = min(GROUPS, len(names))
    group_of = {name: index * groups // len(names) for index, name in enumerate(names)}
    kept = [[video for video, unit in enumerate(units) if group_of[unit] != group] for group in range(groups)]
    if groups < 2 or any(len(videos) < 2 for videos in kept):
        return Estimate(value=whole, low=None, high=None)
    values = np.array([distance(videos) for videos in kept])
    error = math.sqrt((groups - 1) / groups * float(np.sum((values - values.mean()) ** 2)))
    reach = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * error
    return Estimate(value=whole, low=whole - reach, high=whole + reach)


def _mean(values: Values) -> float:
    return math.fsum(values.tolist()) / len(values)
