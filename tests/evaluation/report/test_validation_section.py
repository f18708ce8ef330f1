"""The report's section "While training": the videos in the page are decoded and compared with the frames that were kept."""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from qvgen.evaluation.report.validation_section import build_section, draw_psnr
from qvgen.evaluation.report.writer import write_report
from qvgen.evaluation.validation_files import ValidationFiles, read_validation
from tests.evaluation.report.example_report import INJECTION, report_data
from tests.evaluation.report.test_report import Page

STEPS = (0, 1, 2, 3, 4, 5, 6)
SHOWN = (0, 2, 3, 4, 6)
"""Five of them, evenly."""


def frames(level: int) -> np.ndarray:
    """A flat video of one grey level, which no encoder changes by more than a few."""
    return np.full((4, 16, 16, 3), level, dtype=np.uint8)


def level(step: int, index: int) -> int:
    return 30 + 25 * step + 12 * index


def files_of(directory: Path) -> ValidationFiles:
    return ValidationFiles(directory, prompts=["a red three moving up", INJECTION], seeds=[42, 43], fps=8)


def made_up(step: int, index: int) -> dict[str, float]:
    return {
        "psnr_db": math.inf if step == 6 else 10.0 + step + index,
        "ssim": 0.5 + step / 100,
        "suite/lpips": 0.5 / (1 + step),
    }


def make(directory: Path, *, teacher: bool = True) -> ValidationFiles:
    """Seven steps of two prompts; the PSNR of a step is made up, but for the last one, which is infinite."""
    files = files_of(directory)
    for index in (0, 1):
        if teacher:
            files.write_teacher(index, frames(250 - index * 12))
        for step in STEPS:
            files.write_student(
                index,
                frames(level(step, index)),
                step=step,
                teacher=frames(250) if teacher else None,
                measured=made_up(step, index) if teacher else {},
            )
    return files


def written(run_dir: Path) -> Page:
    return Page(write_report(run_dir, report_data(videos=())).read_text(encoding="utf-8"))


def shown_levels(page: Page) -> list[int]:
    """The grey level of each video of the page, read out of the page."""
    found = []
    for attributes in page.attributes("video"):
        kind, _, content = (attributes["src"] or "").partition(";base64,")
        assert kind == "data:video/mp4"
        with av.open(io.BytesIO(base64.b64decode(content))) as container:
            decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert decoded.shape == (4, 256, 256, 3)
        found.append(int(np.median(decoded)))
    return found


def copied(run_dir: Path, directory: Path) -> ValidationFiles:
    """The files of the fixture ``run_dir`` in another folder, where a test damages some."""
    shutil.copytree(run_dir / "validation", directory)
    return files_of(directory)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    make(path / "validation")
    return path


def test_the_page_shows_teacher_and_student_of_each_prompt(run_dir: Path) -> None:
    page = written(run_dir)
    labels = [attributes["aria-label"] for attributes in page.attributes("video")]
    prompts = ("a red three moving up", INJECTION)
    names = ["Teacher", *(f"Step {step}" for step in SHOWN)]
    assert labels == [f"{name}: {prompt}" for prompt in prompts for name in names]
    expected = [value for index in (0, 1) for value in (250 - index * 12, *(level(step, index) for step in SHOWN))]
    # Encoded twice, and 8 bits of limited range: one level each; neighbours are 12 levels apart or more.
    assert np.abs(np.array(shown_levels(page)) - expected).max() <= 4
    text = " ".join(page.text.split())
    assert "While training" in text
    assert "Shown: steps 0, 2, 3, 4, 6, evenly chosen from 7" in text
    assert "Step 2 12.0 dB" in text.replace("Step 212.0", "Step 2 12.0")
    assert "\N{INFINITY} (identical)" in text
    cells = "Steplpips 00.500 20.167 30.125 40.100 60.0714"
    assert f"(evaluation.suite){cells.replace(' ', '')}" in text.replace(" ", "")
    assert "#validation" in [attributes.get("href") for attributes in page.attributes("a")]
    assert len(page.attributes("script")) == 1
    assert page.attributes("img") == []


def test_the_curve_is_of_the_finite_values(run_dir: Path) -> None:
    videos = read_validation(run_dir / "validation", verify=True)
    chart = draw_psnr(videos, last_step=6)
    assert chart is not None
    assert chart.note == "Thin: each of 2 prompts. Thick: their mean."
    ElementTree.fromstring(chart.svg)
    assert f"{chart.title}" in " ".join(written(run_dir).text.split())
    identical = [video for video in videos if video.step == 6]
    assert draw_psnr(identical, last_step=6) is None


def test_json_holds_a_row_for_each_video(run_dir: Path) -> None:
    written(run_dir)
    rows = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))["validation"]
    assert [(row["step"], row["prompt_index"]) for row in rows] == [(step, index) for step in STEPS for index in (0, 1)]
    assert rows[3] == {
        "step": 1,
        "prompt_index": 1,
        "prompt": INJECTION,
        "seed": 43,
        "psnr_db": 12.0,
        "ssim": 0.51,
        "suite": {"lpips": 0.25},
    }
    assert float(rows[-1]["psnr_db"]) == math.inf


def test_a_run_without_validation_has_no_section(tmp_path: Path) -> None:
    page = written(tmp_path)
    assert "While training" not in page.text
    assert page.attributes("video") == []
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["validation"] == []
    assert build_section((), last_step=3) is None


def test_few_steps_are_all_shown_and_no_teacher_is_none(tmp_path: Path) -> None:
    make(tmp_path / "validation", teacher=False)
    for step in STEPS[3:]:
        for path in (tmp_path / "validation" / f"step-{step:06d}").iterdir():
            path.unlink()
    page = written(tmp_path)
    labels = [(attributes["aria-label"] or "").partition(":")[0] for attributes in page.attributes("video")]
    assert labels == ["Step 0", "Step 1", "Step 2"] * 2
    text = " ".join(page.text.split())
    assert "evenly chosen" not in text
    assert "PSNR of the student's videos" not in text
    rows = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["validation"]
    assert {row["psnr_db"] for row in rows} == {None}


def test_a_damaged_video_is_left_out_and_named(run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = copied(run_dir, tmp_path / "validation")
    damaged = files.path(0, step=2, variant="student")
    damaged.write_bytes(damaged.read_bytes()[:-100])
    files.path(1, step=3, variant="student").with_suffix(".json").write_text("{")
    files.path(1, step=None, variant="teacher").unlink()
    with caplog.at_level(logging.WARNING):
        page = written(tmp_path)
    records = [damaged.with_suffix(".json"), files.path(1, step=3, variant="student").with_suffix(".json")]
    assert sorted(record.getMessage() for record in caplog.records) == sorted(
        f"{path} or a video that it names is damaged; it is left out" for path in records
    )
    labels = [(attributes["aria-label"] or "").partition(":")[0] for attributes in page.attributes("video")]
    assert labels == ["Teacher", "Step 0", "Step 3", "Step 4", "Step 6", "Step 0", "Step 2", "Step 4", "Step 6"]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: [],
        lambda content: {},
        lambda content: {**content, "sha256": {"../../../etc/passwd": ""}},
        lambda content: {**content, "sha256": {"a.mp4": 7}},
        lambda content: {name: value for name, value in content.items() if name != "psnr_db"},
        lambda content: {**content, "prompt": 7},
        lambda content: {**content, "step": [1]},
    ],
    ids=["list", "empty", "outside", "checksum", "no measurement", "prompt", "step"],
)
def test_a_record_of_another_form_is_one_that_is_not_there(
    change: Callable[[dict], object], run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "validation"
    files = copied(run_dir, directory)
    record = files.path(0, step=2, variant="student").with_suffix(".json")
    record.write_text(json.dumps(change(json.loads(record.read_text()))))
    assert not files.has_student(0, step=2)
    found = read_validation(directory, verify=True)
    assert (2, 0) not in {(video.step, video.prompt_index) for video in found}
    assert f"{record} or a video that it names is damaged" in caplog.text
