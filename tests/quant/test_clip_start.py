"""Where clips start: the table against an oracle of its own, and the search against all pairs of candidates."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from qvgen.quant.clip_start import CANDIDATES, COLUMNS, TABLE, initial_clip, search_clips
from qvgen.quant.grid import Grid


def rounded(x: np.ndarray, low: float, high: float, bits: int, *, symmetric: bool = False) -> np.ndarray:
    """Rows in float64 on a grid that covers a share of their range, as docs/numerics.md has it."""
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = np.abs(x).max(1, keepdims=True) * high / top
        return np.clip(np.rint(x / scale), -top, top) * scale
    top = 2**bits - 1
    least, most = np.minimum(x.min(1, keepdims=True), 0) * low, np.maximum(x.max(1, keepdims=True), 0) * high
    scale = (most - least) / top
    zero = np.clip(np.rint(-least / scale), 0, top)
    return (np.clip(np.rint(x / scale) + zero, 0, top) - zero) * scale


def shaped(kind: str, rows: int, columns: int, seed: int = 5) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, columns))
    if kind == "silu":
        return x / (1 + np.exp(-x))
    if kind == "gelu":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return x


@pytest.mark.parametrize(
    ("kind", "symmetric", "bits", "columns"),
    [("gaussian", False, 3, 1024), ("gaussian", False, 4, 64), ("gaussian", True, 4, 4096), ("gelu", False, 4, 4096),
     ("silu", False, 4, 4096), ("gaussian", False, 8, 256), ("gaussian", True, 2, 256)],
)  # fmt: skip
def test_the_entries_lose_least(kind: str, symmetric: bool, bits: int, columns: int) -> None:
    x = shaped(kind, (1 << 18) // columns, columns)

    def error(clip: float) -> float:
        return float(((rounded(x, clip, clip, bits, symmetric=symmetric) - x) ** 2).sum())

    entry = TABLE[kind, symmetric][bits][COLUMNS.index(columns)]  # type: ignore[index]
    assert error(entry) <= 1.01 * min(error(0.2 + 0.02 * i) for i in range(40))


def test_every_kind_has_an_entry_for_every_width_and_length() -> None:
    for rows in TABLE.values():
        assert sorted(rows) == list(range(2, 9))
        for clips in rows.values():
            assert len(clips) == len(COLUMNS)
            assert all(0 < clip < 1 for clip in clips)


def test_between_entries_clips_are_linear_in_the_logarithm_of_the_length() -> None:
    grid = Grid(bits=3, granularity="per_token")
    assert initial_clip(grid, columns=1024) == 0.65
    assert initial_clip(grid, columns=2048) == pytest.approx((0.65 + 0.58) / 2)
    assert initial_clip(grid, columns=8) == 0.86
    assert initial_clip(grid, columns=10**6) == pytest.approx(0.53)
    groups = Grid(bits=4, granularity="per_group", group_size=64, zero_point="none")
    assert initial_clip(groups, columns=8960) == 0.92  # a group is a row
    assert initial_clip(groups, columns=8960, kind="gelu") == 0.92
    assert initial_clip(grid, columns=1024, kind="gelu") == 0.74
    assert initial_clip(grid, columns=1024, kind="bounded") == 0.999


@pytest.mark.parametrize("kind", ["gaussian", "gelu"])
def test_the_search_finds_what_all_pairs_hold(kind: str) -> None:
    x = shaped(kind, 96, 512)
    x[:, 7] *= 6  # a channel that stretches every row
    weights = [np.random.default_rng(6 + i).standard_normal((n, 512)) for i, n in enumerate((24, 40))]
    stacked = np.concatenate(weights)
    found = search_clips(
        torch.from_numpy(x).float(),
        [torch.from_numpy(weight).float() for weight in weights],
        grid=Grid(bits=4, granularity="per_token"),
    )

    def error(low: float, high: float) -> float:
        return float((((rounded(x, low, high, 4) - x) @ stacked.T) ** 2).sum())

    least = min(error(low, high) for low, high in itertools.product(CANDIDATES, repeat=2))
    assert set(found) <= set(CANDIDATES)
    assert error(*found) <= 1.02 * least  # one end after the other may stop beside the best pair
    assert error(*found) < 0.9 * error(0.98, 0.98)


def test_a_wide_layer_is_judged_by_combinations_of_its_outputs() -> None:
    x = torch.from_numpy(shaped("gaussian", 128, 256)).float()
    weight = torch.randn(1024, 256, generator=torch.Generator().manual_seed(3))
    grid = Grid(bits=3, granularity="per_token")
    low, high = search_clips(x, [weight], grid=grid)
    whole = min(
        (float((((torch.from_numpy(rounded(x.double().numpy(), c, c, 3)).float() - x) @ weight.T) ** 2).sum()), c)
        for c in CANDIDATES
    )[1]
    assert abs(low - whole) <= 0.05
    assert abs(high - whole) <= 0.05
    assert (low, high) == search_clips(x, [weight], grid=grid)


def test_a_symmetric_grid_has_one_factor() -> None:
    x = torch.from_numpy(shaped("gelu", 64, 256)).float()
    low, high = search_clips(x, [torch.eye(256)], grid=Grid(bits=4, granularity="per_token", zero_point="none"))
    assert low == high
    groups = Grid(bits=4, granularity="per_group", group_size=64, zero_point="none")
    assert search_clips(x, [torch.eye(256)], grid=groups)[0] in CANDIDATES
