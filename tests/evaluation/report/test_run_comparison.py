"""Runs beside each other: what is read of finished, unfinished and damaged folders, and how it is shown."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from qvgen.data.video import write_video
from qvgen.errors import UserError
from qvgen.evaluation.comparison import video_name
from qvgen.evaluation.report import compare_page
from qvgen.evaluation.report.compare_page import render_comparison
from qvgen.evaluation.report.run_comparison import RunTable, build_table, table_json, table_lines
from qvgen.evaluation.report.run_record import find_runs, read_runs
from qvgen.evaluation.report.writer import write_report
from tests.evaluation.report.example_report import INJECTION, METRICS_CSV, frames, report_data
from tests.evaluation.report.test_report import Page, strict_json


def make_run(path: Path, *, seed: int = 17, rate: float = 0.002, **changes: Any) -> Path:
    """A finished run's folder with the example's report."""
    path.mkdir(parents=True)
    config = {
        "seed": seed,
        "bits": 3,
        "steps": 4,
        "run_dir": str(path),
        "typed": [f"seed={seed}"],
        "optim": {"learning_rate": rate},
        "names": {"model": "tiny", "method": "qvgen"},
        "method": {"_target_": "qvgen.methods.qvgen.QVGen"},
        "profile": {"weight_bits": 3},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "metrics.csv").write_text(METRICS_CSV)
    data = report_data(**changes)
    data = dataclasses.replace(data, run=dataclasses.replace(data.run, seed=seed))
    write_report(path, data)
    for index, video in enumerate(data.videos):
        for shift, variant in ((0, "teacher"), (2, "packed")):
            name = video_name(index, video.prompt, seed=video.seed, variant=variant)
            write_video(path / "videos" / name, frames(shift), fps=video.fps)
    return path


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, one that stopped, four with damaged files, and one that was not begun."""
    root = tmp_path_factory.mktemp("sweep")
    make_run(root / "rate-a")
    worse = dataclasses.replace(report_data().relative_error, packed=0.08)
    make_run(root / "rate-b", rate=0.004, relative_error=worse)
    for name in ("stopped", "no-json", "list", "no-config", "endless", "bad-curves"):
        shutil.copytree(root / "rate-a", root / name, ignore=shutil.ignore_patterns("videos"))
        report = json.loads((root / name / "report.json").read_text())
        (root / name / "report.json").write_text(json.dumps({**report, "videos": []}))
    (root / "stopped" / "report.json").unlink()
    (root / "no-json" / "report.json").write_text('{"model": "ti')
    (root / "list" / "report.json").write_text("[]")
    (root / "no-config" / "config.yaml").write_text("- a\n")
    (root / "endless" / "config.yaml").write_text("a: &a {b: *a}\n")
    (root / "bad-curves" / "metrics.csv").write_text("a,b\n1,2\n")
    return root


NAMES = ["rate-a", "rate-b", "stopped", "no-json", "list", "no-config", "endless", "bad-curves", "not-begun"]


@pytest.fixture(scope="module")
def table(sweep: Path) -> RunTable:
    return build_table(read_runs([sweep / name for name in NAMES]))


def test_what_is_wrong_with_a_run_is_said_of_it_alone(table: RunTable) -> None:
    found = {row.record.name: (row.record.state, row.record.why) for row in table.rows}
    assert list(found) == NAMES
    assert found["rate-a"] == found["rate-b"] == ("finished", "")
    assert found["stopped"] == ("unfinished", "no report.json: step 4 of 4")
    assert {found[name][0] for name in ("no-json", "list", "no-config", "endless")} == {"damaged"}
    assert "report.json: it is no JSON file" in found["no-json"][1]
    assert found["list"][1] == "report.json: it holds no report of a run"
    assert "config.yaml: maximum recursion" in found["endless"][1]
    assert "config.yaml: config.yaml holds no mapping" in found["no-config"][1]
    assert found["bad-curves"][0] == "finished"
    assert found["bad-curves"][1] == "metrics.csv: none of its rows can be used"
    assert found["not-begun"] == ("unfinished", "it was not begun")


def test_settings_that_differ_are_columns_and_no_others(table: RunTable) -> None:
    assert table.settings == ("optim.learning_rate",)  # neither run_dir nor what was typed
    assert [row.settings[0] for row in table.rows[:2]] == ["0.002", "0.004"]
    assert table.rows[-1].settings == ("\N{EN DASH}",)


def test_a_choice_stands_for_what_follows_from_it(tmp_path: Path) -> None:
    for name, method, bits in (("a", "qvgen", "4"), ("b", "lsq", "w4a8")):
        config = {
            "bits": bits,
            "names": {"method": method},
            "method": {
                "_target_": f"qvgen.methods.{method}",
                **({"rank": 32} if method == "lsq" else {}),
            },
            "profile": {"weight_bits": 4, "activation_bits": 4 if bits == "4" else 8},
            "model": {"recipe": {"steps": int(bits[-1])}},
        }
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config))
    assert build_table(read_runs([tmp_path / "a", tmp_path / "b"])).settings == ("bits", "method")


def test_numbers_are_the_reports_and_the_best_has_a_star(table: RunTable) -> None:
    labels = [column.key for column in table.columns]
    first, second = table.rows[0].cells, table.rows[1].cells
    error = labels.index("error_packed")
    assert (first[error].value, second[error].value) == (0.0503, 0.08)
    assert (first[error].best, second[error].best) == (True, False)
    psnr = labels.index("psnr_db")
    assert (first[psnr].value, first[psnr].level, first[psnr].best) == (23.4, "fair", False)  # equal in all
    assert table.rows[0].verdict == "fair"
    assert table.rows[2].cells[error].value is None


def test_the_flow_difference_has_a_column_where_a_report_holds_one(table: RunTable, tmp_path: Path) -> None:
    """A report on a GPU does; the smaller one has the star, and a run without one a dash."""
    assert "flow_difference" not in [column.key for column in table.columns]
    for name, value in (("a", 0.25), ("b", 0.5), ("c", None)):
        make_run(tmp_path / name, videos=())
        report = json.loads((tmp_path / name / "report.json").read_text())
        report["quality"]["variants"]["packed"] |= {} if value is None else {"flow_difference": value}
        (tmp_path / name / "report.json").write_text(json.dumps(report))
    found = build_table(read_runs([tmp_path / name for name in "abc"]))
    keys = [column.key for column in found.columns]
    assert keys.index("lpips") < keys.index("flow_difference") < keys.index("flicker")
    cells = [row.cells[keys.index("flow_difference")] for row in found.rows]
    assert [(cell.value, cell.best) for cell in cells] == [(0.25, True), (0.5, False), (None, False)]
    assert "flow difference" in table_lines(found)[0]
    assert [run["flow_difference"] for run in table_json(found)["runs"]] == [0.25, 0.5, None]


def test_the_table_as_text_names_every_run(table: RunTable) -> None:
    lines = table_lines(table)
    assert lines[0].split()[:3] == ["run", "optim.learning_rate", "videos"]
    assert re.match(r"rate-a +0\.002 +fair +0\.221 +0\.0503\* +23\.4 dB", lines[2])
    assert re.match(r"stopped +0\.002 +unfinished", lines[4])
    assert "stopped: unfinished: no report.json: step 4 of 4" in lines


def test_the_json_says_the_same(table: RunTable, sweep: Path) -> None:
    content = strict_json(json.dumps(table_json(table), allow_nan=False))
    first = content["runs"][0]
    assert {key: first[key] for key in ("name", "state", "verdict", "error_packed", "ssim", "seconds_per_video")} == {
        "name": "rate-a", "state": "finished", "verdict": "fair", "error_packed": 0.0503, "ssim": 0.91,
        "seconds_per_video": 1.4,
    }  # fmt: skip
    assert first["settings"] == {"optim.learning_rate": "0.002"}
    assert (first["bytes_packed"], first["bytes_bf16"], first["kernels"]) == (250_000, 1_000_000, ["vnni"])
    assert content["runs"][-1]["error_packed"] is None


def test_numbers_that_cannot_be_compared_are_warned_of(tmp_path: Path) -> None:
    make_run(tmp_path / "a", videos=())
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    report["relative_error_measured_on"]["seed"] += 1
    (tmp_path / "b" / "report.json").write_text(json.dumps(report))
    assert build_table(read_runs([tmp_path / "a", tmp_path / "b"])).notes == (
        "errors are measured on different inputs: compare with care",
    )


def test_the_page_is_one_file_with_curves_over_each_other_and_videos_in_rows(table: RunTable, sweep: Path) -> None:
    text = render_comparison(table, command="qvgen compare RUN")
    page = Page(text)
    for name in NAMES:
        assert name in page.text
    videos = page.attributes("video")
    # Two captions; the teacher once, because both runs have the same model, noise and sampling.
    labels = [(video["aria-label"] or "").partition(":")[0] for video in videos]
    assert labels == ["Teacher", "rate-a", "rate-b"] * 2
    content = base64.b64decode((videos[1]["src"] or "").partition(";base64,")[2])
    [stored] = (sweep / "rate-a" / "videos").glob("00-*-packed.mp4")
    assert content == stored.read_bytes()
    loss = text[text.index("Training loss") :]
    loss = loss[: loss.index("</svg>")]
    assert all(f"stroke: var(--series-{index})" in loss for index in (1, 2, 3))
    assert INJECTION in page.text  # a caption is text
    assert page.attributes("img") == []
    assert len(page.attributes("script")) == 1
    for attributes in (attributes for _, attributes in page.elements):
        for key in ("src", "href"):
            assert (attributes.get(key) or "#").startswith(("data:", "#"))


def test_other_noise_has_its_own_teacher_and_a_missing_video_is_named(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    for video in report["videos"]:
        video["seed"] += 1
    (tmp_path / "b" / "report.json").write_text(json.dumps(report))
    for path in (tmp_path / "b" / "videos").iterdir():
        seed = re.search(r"seed(\d+)", path.name)
        assert seed is not None
        path.rename(path.with_name(path.name.replace(seed[0], f"seed{int(seed[1]) + 1}")))
    (gone,) = (tmp_path / "b" / "videos").glob("00-*-packed.mp4")
    gone.unlink()
    (broken,) = (tmp_path / "b" / "videos").glob("01-*-packed.mp4")
    broken.write_bytes(b"no video")
    page = Page(render_comparison(build_table(read_runs([tmp_path / "a", tmp_path / "b"])), command=""))
    labels = [(video["aria-label"] or "").partition(":")[0] for video in page.attributes("video")]
    assert labels == ["Teacher", "a", "Teacher"] * 2
    assert "b: videos/00-*seed41-packed.mp4 is missing." in page.text
    assert f"b: videos/{broken.name} cannot be shown (ValueError)." in page.text


def test_more_videos_than_a_page_can_hold_are_left_out_and_counted(
    table: RunTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_page, "MOST_BYTES", 1)
    page = Page(render_comparison(table, command=""))
    assert page.attributes("video") == []
    assert "2 more captions are left out" in page.text


def test_runs_are_found_below_a_folder_and_each_once(sweep: Path, tmp_path: Path) -> None:
    found = find_runs([sweep / "rate-b", sweep])
    assert found[0] == sweep / "rate-b"
    assert sorted(path.name for path in found) == sorted(NAMES[:-1])
    with pytest.raises(UserError, match="nowhere is no folder"):
        find_runs([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no run"):
        find_runs([tmp_path / "empty"])


@pytest.mark.parametrize(
    "content",
    [
        {"quality": 3},
        {"videos": {"a": 1}},
        {"videos": [3, {"prompt": 1, "seed": "x"}]},
        {"verdict": {"level": ["poor"]}},
        {"bytes": {"packed": "many"}},
        {"quality": {"variants": {"packed": {"ssim": [1]}}}},
    ],
)
def test_a_report_of_another_shape_is_no_error(content: dict[str, Any], tmp_path: Path, sweep: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    report = json.loads((sweep / "rate-a" / "report.json").read_text())
    (run_dir / "config.yaml").write_bytes((sweep / "rate-a" / "config.yaml").read_bytes())
    (run_dir / "report.json").write_text(json.dumps({**report, "videos": [], **content}))
    table = build_table(read_runs([run_dir]))
    assert "run" in table_lines(table)[2]
    assert "No run has a metrics.csv." in render_comparison(table, command="")
