"""Real clips beside re-encoded, cut and noised ones: values that are sane, and the same whatever else is done with them.

Skipped, visibly, where the clips were not fetched. The networks that take a CPU a minute, and two processes, are asked for by
QVGEN_LONG_TESTS=1.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qvgen.cli import DONE, main
from qvgen.config.leaves import load_leaf
from qvgen.data.video import write_video
from qvgen.data.video_reader import read_video
from qvgen.evaluation import distance
from qvgen.evaluation.networks import fetched
from qvgen.evaluation.suite.case import Case
from qvgen.evaluation.suite.measuring import measure_case
from tests.evaluation.injected_damage import noise
from tests.evaluation.real_clips import needs_clips, real_clips

LONG = os.environ.get("QVGEN_LONG_TESTS") == "1"
NAMES = ("psnr", "ssim", "lpips", "temporal_flickering")
LONG_NAMES = (*NAMES, "flow_difference", "fvd", "kvd")
SIDE, FRAMES, LATER = 64, 9, 4
STABLE = 1e-6

asked = pytest.mark.skipif(not LONG, reason="minutes: QVGEN_LONG_TESTS=1 asks for it")
pytestmark = needs_clips


def reencoded(frames: Tensor, path: Path) -> Tensor:
    return torch.from_numpy(read_video(write_video(path, frames.numpy(), fps=8, scale=1)))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Tensor]]:
    """Three clips, and what was made of each, uint8 [9, 64, 64, 3]: the cut one begins four frames later."""
    folder = tmp_path_factory.mktemp("encoded")
    whole = real_clips(frames=FRAMES + LATER, side=SIDE)[::3][:3]
    exact = [clip[:FRAMES] for clip in whole]
    return {
        "exact": exact,
        "reencoded": [reencoded(clip, folder / f"{number}.mp4") for number, clip in enumerate(exact)],
        "cut": [clip[LATER:] for clip in whole],
        "noised": [noise(clip, 3) for clip in exact],
    }


def values(clips: Mapping[str, list[Tensor]], kind: str, names: tuple[str, ...] = NAMES) -> list[dict[str, float]]:
    """Of each clip; the metrics whose weights are there."""
    metrics = {name: metric for name in names if (metric := load_leaf("metric", name)).absent() is None}
    found = []
    for number, (video, reference) in enumerate(zip(clips[kind], clips["exact"], strict=True)):
        case = Case(name=str(number), prompt=number, seed=None, caption=None)
        found.append(dict(measure_case(metrics, case, video=video, reference=reference)["values"]))
    return found


def test_values_are_sane(clips: dict[str, list[Tensor]]) -> None:
    for row in values(clips, "exact"):
        assert (row["psnr"], row["ssim"], row.get("lpips", 0.0)) == (100.0, 1.0, 0.0)
    kinds = {kind: values(clips, kind) for kind in ("reencoded", "cut", "noised")}
    for encoded, cut, noised in zip(*kinds.values(), strict=True):
        assert encoded["psnr"] > 30
        assert encoded["psnr"] > noised["psnr"]
        assert encoded["ssim"] > max(noised["ssim"], cut["ssim"])
        assert (
            20 < noised["psnr"] < 24
        )  # 24 levels of noise alone have 20 log10(255 / 24) = 20.5, and black and white cut it
        assert noised["temporal_flickering"] < encoded["temporal_flickering"]
        if "lpips" in encoded:
            assert encoded["lpips"] < min(noised["lpips"], cut["lpips"])
    for rows in kinds.values():
        assert all(math.isfinite(value) for row in rows for value in row.values())


def test_no_run_and_no_batch_size_changes_a_value(
    clips: dict[str, list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames go through LPIPS and RAFT eight at a time, and through SSIM four."""
    names = LONG_NAMES[:5] if LONG else NAMES
    first = values(clips, "noised", names)
    assert values(clips, "noised", names) == first
    monkeypatch.setattr(fetched, "_FRAMES_AT_ONCE", 3)
    monkeypatch.setattr(distance, "SSIM_FRAMES_AT_ONCE", 1)
    for row, again in zip(first, values(clips, "noised", names), strict=True):
        assert again == pytest.approx(row, rel=STABLE, abs=STABLE)


@asked
def test_one_process_and_two_say_the_same(clips: dict[str, list[Tensor]], tmp_path: Path) -> None:
    for name in ("exact", "noised"):
        for number, clip in enumerate(clips[name]):
            write_video(tmp_path / name / f"clip-{number}.mp4", clip.numpy(), fps=8, scale=1)
    found: list[dict[str, Any]] = []
    for devices in (1, 2):
        out = tmp_path / f"out-{devices}"
        words = [f"videos={tmp_path / 'noised'}", f"reference={tmp_path / 'exact'}", f"out={out}", f"devices={devices}"]
        assert main(["evaluate", *words, f"suite.metrics=[{','.join(LONG_NAMES)}]"]) == DONE
        found.append(json.loads((out / "evaluation.json").read_text()))
    assert found[0] == found[1]
    assert {video["name"] for video in found[0]["videos"]} == {"clip-0", "clip-1", "clip-2"}
