"""A part of VBench's list of prompts, and how far its means lie from the whole list's, against numpy on made-up lists."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.data.video import write_video
from qvgen.errors import UserError
from qvgen.evaluation import prompt_subset
from qvgen.evaluation.prompt_list import PromptFacts, PromptList
from qvgen.evaluation.prompt_subset import choose_subset
from qvgen.evaluation.suite import subset_error
from qvgen.evaluation.suite.subset_error import subset_errors


def prompt_list(sizes: dict[tuple[str, ...], int]) -> PromptList:
    """So many prompts of each group of dimensions."""
    return PromptList(
        prompts={
            f"{'+'.join(names)} {number}": PromptFacts(dimensions=frozenset(names), auxiliary={})
            for names, size in sizes.items()
            for number in range(size)
        }
    )


PUBLISHED = {
    ("human_action",): 100, ("temporal_style",): 100, ("overall_consistency", "aesthetic_quality", "imaging_quality"): 91,
    ("appearance_style",): 88, ("scene", "background_consistency"): 86, ("color",): 85, ("spatial_relationship",): 84,
    ("multiple_objects",): 82, ("object_class",): 79, ("temporal_flickering",): 75,
    ("subject_consistency", "dynamic_degree", "motion_smoothness"): 72,
    ("appearance_style", "overall_consistency", "aesthetic_quality", "imaging_quality"): 2,
}  # fmt: skip
"""The groups of VBench_full_info.json (Vchitect/VBench) and their sizes: 944 prompts."""


def test_72_prompts_are_6_or_7_of_each_dimension() -> None:
    prompts = prompt_list(PUBLISHED)
    chosen = choose_subset(prompts, 72)
    counts = Counter(name for facts in chosen.prompts.values() for name in facts.dimensions)
    assert len(chosen.prompts) == 72
    assert len(counts) == 16
    assert set(counts.values()) <= {6, 7}
    backwards = PromptList(prompts=dict(reversed(prompts.prompts.items())))
    assert set(choose_subset(backwards, 72).prompts) == set(chosen.prompts)  # only the texts decide
    assert set(chosen.prompts) < set(choose_subset(prompts, 100).prompts)
    assert list(chosen.prompts) == [text for text in prompts.prompts if text in chosen.prompts]
    assert set(choose_subset(prompts, 72, salt="1").prompts) != set(chosen.prompts)


def test_a_small_dimension_gives_all_and_the_others_the_rest() -> None:
    chosen = choose_subset(prompt_list({("a",): 2, ("b",): 50, (): 9}), 12)
    assert Counter(name for facts in chosen.prompts.values() for name in facts.dimensions) == {"a": 2, "b": 10}


@pytest.mark.parametrize(
    ("count", "message"), [(5, "no part of a list of 5 prompts"), (1, "no prompt would be left for b")]
)
def test_a_part_that_is_none_is_refused(count: int, message: str) -> None:
    with pytest.raises(UserError, match=f"vbench.subset={count} is .*{message}"):
        choose_subset(prompt_list({("a",): 3, ("b",): 2}), count)


def test_the_errors_are_those_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of different spread; the rms of 200 choices is near the error that a stratified sample has (10 sigma)."""
    prompts = prompt_list({("a",): 30, ("b",): 50})
    rng = np.random.default_rng(0)
    scores = {text: rng.normal(5 if "a" in text else 0, 1 if "a" in text else 3) for text in prompts.prompts}
    videos = [
        {"caption": text, "values": {"x": value + shift, **({"b_alone": value} if "b" in text else {})}}
        for text, value in scores.items()
        for shift in (-0.25, 0.25)  # two seeds
    ]
    monkeypatch.setattr(subset_error, "DRAWS", 200)
    found = subset_errors({"videos": videos}, prompts, 20)
    whole, ours = np.array(list(scores.values())), {text: scores[text] for text in choose_subset(prompts, 20).prompts}
    groups = [np.array([value for text, value in ours.items() if text[0] == name]) for name in "ab"]
    assert [len(group) for group in groups] == [10, 10]
    row = found["x"]
    assert (row["prompts"], row["chosen"]) == (80, 20)
    assert row["whole"] == pytest.approx(whole.mean(), rel=1e-12)
    assert row["subset"] == pytest.approx(np.mean(list(ours.values())), rel=1e-12)
    assert row["error"] == pytest.approx(row["subset"] - row["whole"], rel=1e-12)
    assert row["spread"] == pytest.approx(whole.std(ddof=1), rel=1e-12)
    expected = sum(
        0.25 * (1 - 10 / size) * group.var(ddof=1) / 10 for group, size in zip(groups, (30, 50), strict=True)
    )
    assert row["predicted"] == pytest.approx(np.sqrt(expected), rel=1e-12)
    b = groups[1]
    assert found["b_alone"]["chosen"] == 10
    assert found["b_alone"]["predicted"] == pytest.approx(np.sqrt((1 - 10 / 50) * b.var(ddof=1) / 10), rel=1e-12)
    all_b = whole[30:]
    sampled = np.sqrt((1 - 10 / 50) * all_b.var(ddof=1) / 10)
    assert found["b_alone"]["rms"] == pytest.approx(sampled, rel=0.5)  # sqrt(1 / (2 * 200)) = 0.05
    assert row["dimensions"]["b"] == pytest.approx({name: found["b_alone"][name] for name in row["dimensions"]["b"]})
    assert row["dimensions"]["a"]["predicted"] == pytest.approx(np.sqrt((1 - 10 / 30) * groups[0].var(ddof=1) / 10))
    with pytest.raises(UserError, match="lacks 1 of the list's prompts, the first of them 'a 0'"):
        subset_errors({"videos": videos[2:]}, prompts, 20)


def test_the_commands_write_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = prompt_list({("a",): 30, ("b",): 30})
    path = tmp_path / "info.json"
    path.write_text(json.dumps(prompts.entries()))
    prompt_subset.main([str(path), "7"])
    entries = json.loads(capsys.readouterr().out)
    assert [entry["prompt_en"] for entry in entries] == list(choose_subset(prompts, 7).prompts)
    for module in (prompt_subset, subset_error):
        with pytest.raises(UserError, match="write python -m qvgen.evaluation."):
            module.main([str(path), "x"])


def test_an_evaluation_takes_the_videos_of_the_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    prompts = prompt_list({("temporal_flickering",): 4, ("scene",): 2})
    Path("info.json").write_text(json.dumps(prompts.entries()))
    for number, text in enumerate(prompts.prompts):
        for folder in ("videos", "reference"):
            frames = np.full((2, 32, 32, 3), 30 + 9 * number, dtype=np.uint8)
            write_video(f"{folder}/{text}-0.mp4", frames, fps=8, scale=1)
    words = [
        "evaluate", "videos=videos", "reference=reference", "suite.metrics=[temporal_flickering,psnr]",
        "vbench.info=info.json", "vbench.subset=3",
    ]  # fmt: skip
    assert main(words) == DONE
    content = json.loads(Path("evaluation/evaluation.json").read_text())
    chosen = choose_subset(prompts, 3).prompts
    assert {video["caption"] for video in content["videos"]} == set(chosen)
    assert content["vbench"]["subset"] == {"prompts": 3, "of": 6}
    gone = next(iter(chosen))
    Path(f"videos/{gone}-0.mp4").unlink()
    assert main([*words, "out=other"]) == BAD_INPUT
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"videos: 1 of the 3 prompts that vbench.subset chooses are not there, the first of them '{gone}'" in line
    assert main([*words, "vbench.info=null"]) == BAD_INPUT
    assert "vbench.subset=3 needs the list of prompts" in capsys.readouterr().err


def test_the_page_has_the_measured_errors() -> None:
    """The table of docs/vbench.md is the file's; the prediction is as near to the errors of other choices as it says."""
    docs = Path(__file__).resolve().parents[2] / "docs"
    metrics = json.loads((docs / "benchmarks" / "subset-error-tiny.json").read_text())["metrics"]
    page = (docs / "vbench.md").read_text(encoding="utf-8")
    for name, row in metrics.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {name} | ")]
        shown = [float(cell) for cell in line.strip("| ").split(" | ")[1:]]
        names = ("spread", "whole", "subset", "error", "predicted", "rms")
        assert shown == [round(row[key], 3 if name == "psnr" else 4) for key in names]
        assert row["predicted"] == pytest.approx(row["rms"], rel=0.04)
    parts = [part for row in metrics.values() for part in row["dimensions"].values()]
    within = sum(abs(part["error"]) <= part["predicted"] for part in parts)
    assert f"of the {len(parts)} errors of one metric in one motion {within} lie within it" in " ".join(page.split())
