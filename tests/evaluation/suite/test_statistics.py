"""Intervals, tests and sample sizes against scipy's own, against all assignments counted, and against simulated models."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from qvgen.evaluation.suite.statistics import (
    EXACT,
    RESAMPLES,
    clusters,
    difference,
    estimate,
    set_estimate,
    sign_test,
)

GENERATOR = np.random.default_rng(3)
PROMPTS = [prompt for prompt in range(30) for _ in range(3)]
VALUES = [float(value) for value in GENERATOR.normal(20, 2, 30).repeat(3) + GENERATOR.normal(0, 0.5, 90)]


def test_the_interval_is_scipy_s_bootstrap_of_the_prompts_means() -> None:
    """Two sets of 10 000 draws: their percentiles differ by about a fiftieth of the interval's width."""
    found = estimate(VALUES, PROMPTS)
    means = np.reshape(VALUES, (30, 3)).mean(1)
    theirs = scipy.stats.bootstrap((means,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=1)
    low, high = theirs.confidence_interval
    assert found.low is not None
    assert found.high is not None
    assert found.value == pytest.approx(np.mean(VALUES), rel=1e-12)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03 * (high - low))
    assert estimate(VALUES, PROMPTS) == found
    one_by_one = estimate(VALUES, range(90))
    assert one_by_one.low is not None
    assert one_by_one.low > found.low  # videos of one prompt are alike: drawn by themselves they promise too much


def test_the_estimate_weighs_prompts_alike_and_of_one_prompt_its_seeds() -> None:
    assert estimate([1.0, 3.0, 8.0], [0, 0, 1]).value == 5.0
    assert clusters([1.0, 3.0, 8.0], [4, 4, 4]).tolist() == [1.0, 3.0, 8.0]
    alone = estimate([2.0], [0])
    assert (alone.value, alone.low, alone.high) == (2.0, None, None)
    assert difference([2.0], [1.0], [0]).p is None


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Of 200 tables of 20 prompts: 95 % less what percentiles of few prompts lack; a binomial's 3 deviations are 5 %."""
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        found = estimate(generator.normal(1.0, 1.0, 20).tolist(), range(20))
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 1.0 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_few_prompts_are_tested_by_all_signs() -> None:
    means = np.array([0.5, -0.2, 0.9, 0.4, 0.1])
    count = sum(
        abs(np.dot(signs, means)) >= abs(means.sum()) * (1 - 1e-12) for signs in itertools.product((1, -1), repeat=5)
    )
    assert sign_test(means) == count / 32
    theirs = scipy.stats.permutation_test((means,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_test(means) == pytest.approx(theirs.pvalue)
    assert sign_test(np.zeros(6)) == 1.0


def test_many_prompts_are_tested_by_drawn_signs() -> None:
    means = np.random.default_rng(2).normal(0.2, 1.0, EXACT + 26)
    theirs = scipy.stats.permutation_test(
        (means,), np.mean, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(1)
    )
    found = sign_test(means)
    assert found is not None
    assert found == pytest.approx(theirs.pvalue, abs=0.015)  # each is off by 0.0035
    assert sign_test(means) == found


def test_so_many_videos_would_settle_it() -> None:
    """The formula by scipy's quantiles; and that many prompts do find the difference in about POWER of all tables."""
    generator = np.random.default_rng(5)
    first, second = generator.normal(0.5, 1.0, 40), np.zeros(40)
    found = difference(first.tolist(), second.tolist(), range(40))
    size, deviation = abs(first.mean()), first.std(ddof=1)
    needed = ((scipy.stats.norm.ppf(0.975) + scipy.stats.norm.ppf(0.8)) * deviation / size) ** 2
    assert found.videos == math.ceil(needed)
    hits = [
        scipy.stats.ttest_1samp(generator.normal(size, deviation, found.videos), 0).pvalue < 0.05 for _ in range(400)
    ]
    assert np.mean(hits) == pytest.approx(0.8, abs=0.08)
    with_seeds = difference(first.repeat(3).tolist(), second.repeat(3).tolist(), np.arange(40).repeat(3).tolist())
    assert with_seeds.videos == math.ceil(3 * needed)
    assert difference([1.0, 1.0], [1.0, 1.0], [0, 1]).videos is None


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = GENERATOR.normal(0, 1, 25)
    found = set_estimate(lambda chosen: float(values[list(chosen)].mean()), range(25))
    error = values.std(ddof=1) / 25**0.5
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - scipy.stats.norm.ppf(0.975) * error)
    assert set_estimate(lambda chosen: float(len(chosen)), [0, 1]).low is None
