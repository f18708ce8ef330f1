"""Statistics of full-size models within calibration.memory_gib: planned passes against the collectors themselves, on meta.

The documented totals are counted here from the layers' widths alone.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from qvgen.config.leaves import load_leaf
from qvgen.initializers.calibration import MAX_INPUTS, Calibration, passes, statistics_bytes

GIB = 2**30
BANDS = 50
SECOND_MOMENTS_GIB = {"cogvideox": 8.91, "wan-14b": 64.54}
"""Sum of 4 K^2 bytes over all Linears, and 50 bands of maxima."""


@pytest.fixture(scope="module", params=SECOND_MOMENTS_GIB)
def skeleton(request: pytest.FixtureRequest) -> tuple[str, nn.Module, list[tuple[str, int]]]:
    family = load_leaf("model", request.param)
    with torch.device("meta"):
        model = family.build(family.transformer_config)
    sizes = [(name, layer.in_features) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    return request.param, model, sizes


def collected_bytes(model: nn.Module, names: list[str], needs: set[str]) -> int:
    """What the collectors of a pass allocate; their samples of inputs grow to MAX_INPUTS rows."""
    with torch.device("meta"):
        watch = Calibration(model, names=names, needs=needs, num_bands=BANDS, seed=0)
    total = 0
    for watched in watch._watched.values():
        tensors = [watched._abs_max, watched._moment]
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
        total += 0 if watched._inputs is None else 4 * MAX_INPUTS * watched._inputs.shape[1]
    return total


@pytest.mark.parametrize("budget_gib", [1, 4, 16])
@pytest.mark.parametrize("needs", [{"abs_max"}, {"abs_max", "inputs"}, {"second_moment"}])
def test_no_pass_takes_more_than_it_may(skeleton, needs: set[str], budget_gib: int) -> None:
    _, model, sizes = skeleton
    found = passes(sizes, needs=frozenset(needs), num_bands=BANDS, budget_bytes=budget_gib * GIB)
    assert [name for names in found for name in names] == [name for name, _ in sizes]
    used = [collected_bytes(model, names, needs) for names in found]
    assert max(used) <= budget_gib * GIB
    assert sum(used) == sum(statistics_bytes(size, needs=frozenset(needs), num_bands=BANDS) for _, size in sizes)
    widest = max(statistics_bytes(size, needs=frozenset(needs), num_bands=BANDS) for _, size in sizes)
    assert all(bytes_ > budget_gib * GIB - widest for bytes_ in used[:-1])  # none is begun too early


def test_the_documented_totals(skeleton) -> None:
    name, _, sizes = skeleton
    total = sum(4 * size * size + 4 * BANDS * size for _, size in sizes) / GIB
    assert total == pytest.approx(SECOND_MOMENTS_GIB[name], abs=0.05)
    text = (Path(__file__).resolve().parents[3] / "docs" / "models.md").read_text(encoding="utf-8")
    assert f"{total:.1f} GiB" in text


def test_a_layer_that_fits_nowhere_is_refused(skeleton) -> None:
    _, _, sizes = skeleton
    widest = max(size for _, size in sizes)
    need = statistics_bytes(widest, needs=frozenset({"second_moment"}), num_bands=BANDS)
    first = next(name for name, size in sizes if size == widest)
    with pytest.raises(ValueError, match=rf"calibration\.memory_gib=.* {re.escape(first)} .* needs {need / 2**30:.3g}"):
        passes(sizes, needs=frozenset({"second_moment"}), num_bands=BANDS, budget_bytes=need - 1)
