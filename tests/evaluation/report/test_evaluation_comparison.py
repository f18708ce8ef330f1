"""qvgen compare of evaluations: intervals as they were found, paired tests worked out again, and the front of bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.evaluation.report.evaluation_comparison import pareto_front, read_models

PSNR = {
    "title": "PSNR", "unit": "dB", "source": "mean squared error", "range": [0.0, 100.0], "better": "higher", "paired": True,
    "blind_to": [], "weights": [],
}  # fmt: skip


def write_evaluation(
    folder: Path, label: str, values: list[float], *, nbytes: int | None = None, first: int = 0
) -> Path:
    """A folder as `qvgen evaluate` leaves one, with a prompt for each value."""
    folder.mkdir()
    model: dict[str, Any] = {"label": label}
    if nbytes is not None:
        model["bytes"] = nbytes
    mean = float(np.mean(values))
    videos = [
        {
            "name": f"{place:02d}", "prompt": f"prompt {place}", "caption": "c", "seed": 1, "values": {"psnr": value},
            "reference_values": {},
        }
        for place, value in enumerate(values, first)
    ]  # fmt: skip
    content = {
        "format": "qvgen-evaluation", "version": 1, "key": label, "model": model, "reference": {"label": "teacher"},
        "suite": "fast", "settings": {}, "versions": {}, "num_videos": len(values), "num_prompts": len(values),
        "intervals": {"confidence": 0.95, "resamples": 10, "drawn": "prompts"}, "skipped": {},
        "metrics": {"psnr": {**PSNR, "num_videos": len(values), "value": mean, "low": mean - 1, "high": mean + 1}},
        "videos": videos,
    }  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    values, noise = np.linspace(20, 23, 8), np.array([0.4, -0.3, 0.2, -0.4, 0.3, -0.2, 0.1, -0.1])
    return [
        write_evaluation(tmp_path / "ptq", "ptq", list(values), nbytes=3000),
        write_evaluation(tmp_path / "qat", "qat", list(values + 5 + 0.2 * np.arange(8)), nbytes=3000),
        write_evaluation(tmp_path / "wide", "wide", list(values + noise), nbytes=8000),
    ]


def test_a_row_for_each_model_with_its_test_against_the_first(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *map(str, folders), f"out={tmp_path / 'out'}"]) == DONE
    head, _, ptq, qat, wide, last = capsys.readouterr().out.splitlines()
    assert head == "| model | bytes | PSNR (dB) \N{UPWARDS ARROW} |"
    assert ptq == "| ptq | 3000 | 21.5 [20.5, 22.5] |"
    assert qat.startswith("| qat | 3000 | 27.2 [26.2, 28.2] (p 0.0078)")  # 2 / 2^8: all eight differences have one sign
    assert " = (p " in wide
    assert last == f"comparison: {tmp_path / 'out' / 'compare.html'}"
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    change = found["models"][1]["against_first"]["psnr"]
    assert change["value"] == pytest.approx(5 + 0.2 * 3.5)
    assert (change["num_videos"], change["is_settled"]) == (8, True)
    assert found["front"] == ["qat"]
    assert (tmp_path / "out" / "compare.md").read_text().splitlines()[2] == ptq
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "3 evaluations" in page
    assert "against MB of weights" in page
    assert "21.5 [20.5, 22.5]" in page


def test_a_paper_s_numbers_stand_beside_them_marked_as_published(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", *map(str, folders), f"out={tmp_path / 'out'}"]
    assert main([*words, "published=qvgen"]) == DONE
    printed = capsys.readouterr().out
    assert "Published, not measured here: QVGen, arXiv 2505.11497 (VBench, %, higher is better)" in printed
    assert "| QVGen W4A4 | 60.16 | 67.22 | 31.42 | 80.62 |" in printed
    assert "| QVGen W3A3 | 58.36 | 53.89 | 23.85 | \N{EN DASH} |" in printed
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert found["published"]["rows"]["Q-DM W4A4"]["total"] == 78.44
    assert len(found["models"]) == 3
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "Not measured here: QVGen, arXiv 2505.11497, CogVideoX-2B" in page
    assert "<td>60.16</td><td>67.22</td>" in page
    assert main(words) == DONE  # nobody asked
    assert "Published" not in (tmp_path / "out" / "compare.html").read_text()
    capsys.readouterr()
    assert main([*words, "published=qvgem"]) == BAD_INPUT
    assert "unknown published=qvgem; did you mean 'qvgen'" in capsys.readouterr().err


def test_the_front_holds_what_no_other_one_beats(tmp_path: Path) -> None:
    sizes = {"small": (20.0, 10), "worse": (19.0, 20), "good": (25.0, 30), "same": (25.0, 40), "best": (26.0, 50)}
    folders = [
        write_evaluation(tmp_path / name, name, [value] * 3, nbytes=size) for name, (value, size) in sizes.items()
    ]
    models = read_models(folders)
    assert [model.name for model in pareto_front(models)] == ["small", "good", "best"]
    assert [model.nbytes for model in models] == [10, 20, 30, 40, 50]


def test_what_has_nothing_beside_it_is_refused(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_evaluation(tmp_path / "other", "other", [1.0], first=100)
    for words, message in (
        ([str(folders[0])], "one evaluation has nothing beside it; name two or more"),
        ([str(folders[0]), str(other)], "have no video in common"),
        ([str(folders[0]), str(tmp_path)], f"and {tmp_path} does not; compare runs or evaluations"),
    ):
        assert main(["compare", *words]) == BAD_INPUT
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    (folders[1] / "evaluation.json").write_text("[]")
    assert main(["compare", *map(str, folders)]) == BAD_INPUT
    assert "holds no evaluation" in capsys.readouterr().err
