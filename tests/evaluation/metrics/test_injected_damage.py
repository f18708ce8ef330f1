"""Injected damage in four strengths moves each metric monotonically towards worse, or the metric says it is blind to it.

The metrics by RAFT take minutes on a CPU: QVGEN_LONG_TESTS=1 asks for them.
"""

from __future__ import annotations

import itertools
import math
import os

import pytest

from qvgen.config.leaves import load_leaf
from qvgen.evaluation.metrics.base import Clip, Pair
from tests.evaluation.injected_damage import DAMAGE, STRENGTHS
from tests.evaluation.metrics.test_metric_values import NETWORKS, needs, walk

QUICK, SLOW = (
    ("psnr", "ssim", "lpips", "temporal_flickering"),
    ("flow_difference", "warping_error", "motion_compensated_error"),
)
CLEAN = Clip(walk(6, side=48))

asked = pytest.mark.skipif(os.environ.get("QVGEN_LONG_TESTS") != "1", reason="minutes: QVGEN_LONG_TESTS=1 asks for it")


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [*([needs(NETWORKS[name])] if name in NETWORKS else []), *([asked] if name in SLOW else [])]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in (*QUICK, *SLOW)])
def test_damage_moves_a_metric_as_it_says(name: str, damage: str) -> None:
    metric = load_leaf("metric", name)
    sign = -1 if metric.better == "higher" else 1

    def cost(clip: Clip) -> float:
        return sign * metric.measure(Pair(video=clip, reference=CLEAN if metric.paired else None, caption=None))

    costs = [cost(CLEAN), *(cost(Clip(DAMAGE[damage](CLEAN.frames, strength))) for strength in STRENGTHS)]
    assert all(math.isfinite(value) for value in costs)
    sees = all(before < after for before, after in itertools.pairwise(costs))
    assert sees == (damage not in metric.blind_to), costs
