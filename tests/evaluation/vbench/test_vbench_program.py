"""VBench's own program in a user's environment, by a stand-in with the published class in an environment of its own.

The stand-in (stand_in_vbench.py) is not VBench: what is tested is that the right videos are asked for and that answers, good
and bad, are read rightly. No number of the real package was at hand. An expected value is made from a file's bytes here anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import sysconfig
import venv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.config.leaves import load_leaf
from qvgen.config.prompts.prompt import PromptedVideo
from qvgen.data.claims import Claims
from qvgen.data.video import write_video
from qvgen.data.video_reader import read_frames
from qvgen.errors import UnfitEnvironmentError
from qvgen.evaluation.prompt_list import PromptFacts, PromptList
from qvgen.evaluation.suite.case import Case
from qvgen.evaluation.suite.clip_store import SampledClips
from qvgen.evaluation.vbench_program.dimension import ProgramDimension
from qvgen.evaluation.vbench_program.program import VBenchProgram
from qvgen.evaluation.vbench_program.result import read_result
from qvgen.verbs._evaluated_models import Compared, Side
from qvgen.verbs._program_share import ProgramShare

CUP, CAT, CAR = "a still cup", "a cat", "a red car"
INFO = [
    {"prompt_en": CUP, "dimension": ["temporal_flickering", "imaging_quality", "dynamic_degree"]},
    {"prompt_en": CAT, "dimension": ["object_class"], "auxiliary_info": {"object_class": {"object": "cat"}}},
    {"prompt_en": CAR, "dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}},
]
CONCERNS = {name: entry["prompt_en"] for entry in INFO for name in entry["dimension"]}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has the stand-in and nothing else: no torch, no numpy."""
    folder = tmp_path_factory.mktemp("environment") / "env"
    venv.create(folder, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (packages / "vbench").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("stand_in_vbench.py"), packages / "vbench/__init__.py")
    (packages / "vbench-0.1.5.dist-info").mkdir()
    (packages / "vbench-0.1.5.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: vbench\nVersion: 0.1.5\n")
    return folder / "bin/python"


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: Path) -> list[str]:
    """A command on two videos of each prompt, and a reference of others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STAND_IN_CALLS", str(tmp_path / "calls.txt"))
    for folder, shade in (("videos", 40), ("reference", 90)):
        for place, caption in enumerate((CUP, CAT, CAR)):
            for number in range(2):
                frames = np.full((2, 32, 32, 3), shade + 20 * place + 7 * number, dtype=np.uint8)
                write_video(f"{folder}/{caption}-{number}.mp4", frames, fps=8, scale=1)
    Path("info.json").write_text(json.dumps(INFO))
    dimensions = f"[{','.join(CONCERNS)}]"
    return [
        "evaluate", "videos=videos", "reference=reference", f"suite.metrics={dimensions}", "vbench.info=info.json",
        f"vbench.python={python}",
    ]  # fmt: skip


def number_of(path: str) -> float:
    return int.from_bytes(hashlib.sha256(Path(path).read_bytes()).digest()[:4], "big") / 2**32


def calls() -> list[str]:
    return [json.loads(line)[0] for line in Path("calls.txt").read_text().splitlines()]


def test_the_program_measures_all_dimensions_of_both_sides(words: list[str], tmp_path: Path) -> None:
    assert main([*words, "vbench.weights=weights"]) == DONE
    content = json.loads(Path("evaluation/evaluation.json").read_text())
    assert content["skipped"] == {}
    for name, caption in CONCERNS.items():
        numbers = [1] if name == "color" else [0, 1]  # the program never sees the object in the first one
        for key, folder in (("values", "videos"), ("reference_values", "reference")):
            found = {video["name"]: video[key][name] for video in content["videos"] if name in video[key]}
            bytes_ = {f"{caption}-{number}": number_of(f"{folder}/{caption}-{number}.mp4") for number in numbers}
            expected = {case: value > 0.5 for case, value in bytes_.items()} if name == "dynamic_degree" else bytes_
            assert found == pytest.approx({case: float(value) for case, value in expected.items()}, rel=1e-15)
        values = [video["values"][name] for video in content["videos"] if name in video["values"]]
        assert content["metrics"][name]["value"] == pytest.approx(np.mean(values), rel=1e-12)
        assert content["vbench"]["program"]["scores"][name] == pytest.approx(np.mean(values), rel=1e-12)
        assert "own program, vbench 0.1.5" in content["metrics"][name]["source"]
    assert content["vbench"]["program"]["versions"]["torch"] is None
    asked = [json.loads(line) for line in Path("calls.txt").read_text().splitlines()]
    assert sorted(row[0] for row in asked) == sorted([*CONCERNS, *CONCERNS])
    assert {tuple(row[1:]) for row in asked} == {("cpu", True, "vbench_standard", str(tmp_path / "weights"))}


def test_without_the_program_the_dimensions_ask_for_their_weights(words: list[str]) -> None:
    assert main(words[:-1]) == DONE
    skipped = json.loads(Path("evaluation/evaluation.json").read_text())["skipped"]
    assert all("grit_b_densecap_objectdet.pth is not there" in skipped[name] for name in ("object_class", "color"))
    assert not Path("calls.txt").exists()


def test_a_killed_program_is_named_and_the_same_command_goes_on_behind_what_is_there(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "out=whole"]) == DONE
    Path("calls.txt").unlink()
    monkeypatch.setenv("STAND_IN", "kill:object_class")
    assert main(words) == BAD_INPUT
    line = capsys.readouterr().err.splitlines()[-1]
    assert "was killed by signal SIGKILL at object_class" in line
    before = calls()
    assert before.count("object_class") == 1
    assert before.count("dynamic_degree") == 2
    monkeypatch.delenv("STAND_IN")
    assert main(words) == DONE
    assert sorted(calls()[len(before) :]) == ["color", "color", "object_class", "object_class"]
    assert Path("evaluation/evaluation.json").read_bytes() == Path("whole/evaluation.json").read_bytes()


def test_without_a_reference_one_side_is_measured(words: list[str]) -> None:
    assert main([*words, "reference=null", "suite.metrics=[object_class,scene]"]) == DONE
    content = json.loads(Path("evaluation/evaluation.json").read_text())
    values = [video["values"]["object_class"] for video in content["videos"] if video["caption"] == CAT]
    assert values == pytest.approx([number_of(f"videos/{CAT}-{number}.mp4") for number in range(2)], rel=1e-15)
    assert "no video has a value" in content["skipped"]["scene"]
    assert all(video["reference_values"] == {} for video in content["videos"])
    assert calls() == ["object_class"]


def test_a_dimension_that_fails_is_one_line(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STAND_IN", "fail:object_class")
    assert main([*words, "suite.metrics=[object_class]"]) == BAD_INPUT
    line = capsys.readouterr().err.splitlines()[-1]
    assert "failed with exit code 1 at object_class: ModuleNotFoundError: No module named 'detectron2'" in line
    assert not Path("evaluation/evaluation.json").exists()


def row_of(name: str, value: object) -> dict[str, object]:
    return {"video_path": f"/x/{name}", "video_results": value}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "with no pair of a score and a list of videos"),
        ({"scene": [1.0]}, "with no pair"),
        ({"scene": [1.0, [3]]}, "with an entry of None"),
        ({"scene": ["1", []]}, "with the score '1', which is no finite number"),
        ({"scene": [float("nan"), []]}, "with the score nan"),
        ({"scene": [1.0, [row_of("a-0.mp4", None)]]}, "with None of a-0.mp4"),
        ({"scene": [1.0, [row_of("a-0.mp4", float("inf"))]]}, "with inf of a-0.mp4"),
        (
            {"scene": [1.0, [row_of("other-0.mp4", 1.0)]]},
            "with an entry of '/x/other-0.mp4', which is no video that was",
        ),
        ({"scene": [1.0, [row_of("a-0.mp4", 1.0)] * 2]}, "with two entries of a-0.mp4"),
        ({"scene": [1.0, [row_of("a-1.mp4", 1.0)]]}, "without 1 of 2 videos, the first of them a-0.mp4"),
    ],
)
def test_another_answer_is_refused(content: object, message: str) -> None:
    with pytest.raises(UnfitEnvironmentError, match=message):
        read_result(content, "scene", names=["a-0.mp4", "a-1.mp4"])


def test_color_may_leave_out_a_video_and_truths_are_numbers() -> None:
    rows = [row_of("a-1.mp4", True)]
    assert read_result({"color": [1, rows]}, "color", names=["a-0.mp4", "a-1.mp4"]) == (1.0, {"a-1.mp4": 1.0})


def test_the_videos_of_imaging_quality_are_parts_of_a_hundred() -> None:
    rows = [{"video_path": "/x/a-0.mp4", "video_results": 62.5}]
    assert read_result({"imaging_quality": [0.625, rows]}, "imaging_quality", names=["a-0.mp4"]) == (
        0.625,
        {"a-0.mp4": 0.625},
    )
    with pytest.raises(UnfitEnvironmentError, match="no parts of 100"):
        read_result({"imaging_quality": [62.5, rows]}, "imaging_quality", names=["a-0.mp4"])


def test_wrong_environments_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """No file, no program, another program, a Python without the package, and keys that need each other."""
    Path("text").write_text("no program")
    Path("other").write_text("#!/bin/sh\necho not a snake >&2\nexit 3\n")
    Path("other").chmod(0o755)
    for change, message in {
        "vbench.python=nowhere/python": "vbench.python=nowhere/python is no file",
        "vbench.python=text": "vbench.python=text can't be run",
        "vbench.python=other": "vbench.python=other is no Python from 3.8 on: it answers 'not a snake'",
        f"vbench.python={sys.executable}": "has no package vbench; install it there",
        "vbench.info=null": "needs the list of prompts: vbench.info=VBench_full_info.json",
        "+metric.temporal_flickering.x=1": "x",
        "suite.metrics=[flow_score]": "has no effect: suite.metrics names no dimension of VBench",
    }.items():
        assert main([*words, change]) == BAD_INPUT, change
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert not Path("calls.txt").exists()


def test_videos_that_the_program_would_not_find_are_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2, 6):
        shutil.copy(f"videos/{CAT}-0.mp4", f"videos/{CAT}-{number}.mp4")
    assert main([*words, "reference=null"]) == BAD_INPUT
    assert "VBench looks at 5 videos of a prompt, and 'a cat' has more" in capsys.readouterr().err.splitlines()[-1]


def test_a_request_to_stop_ends_the_program(python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN", "hang:color")
    monkeypatch.setenv("STAND_IN_CALLS", str(tmp_path / "pid"))
    (tmp_path / "info.json").write_text(json.dumps(INFO))

    def stop(number: int, frame: object) -> None:
        del frame
        if not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().isdigit():
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            return
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            VBenchProgram(python, cache=None).evaluate(
                "color", info=tmp_path / "info.json", videos=tmp_path, folder=tmp_path
            )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_sampled_videos_are_written_for_the_program(python: Path, tmp_path: Path) -> None:
    """They are kept as tensors, and the program reads mp4: the levels come back within the encoder's loss."""
    case = Case(
        name="00-a-cat-seed1", prompt=0, seed=1, caption=CAT, asked=PromptedVideo(caption=CAT, seed=1, negative="")
    )
    clips = SampledClips(tmp_path / "videos", "x")
    clips.write(case, torch.full((3, 32, 48, 3), 120, dtype=torch.uint8))
    compared = Compared(
        cases=(case,),
        model=Side(label="x", facts={}, clips=clips),
        reference=None,
        settings={},
        family=SimpleNamespace(fps=8),
    )
    prompts = PromptList(
        prompts={
            CAT: PromptFacts(dimensions=frozenset(["object_class"]), auxiliary={"object_class": {"object": "cat"}})
        }
    )
    program = VBenchProgram(python, cache=None)
    metrics = {"object_class": ProgramDimension(load_leaf("metric", "object_class"), program)}
    share = ProgramShare(tmp_path, compared=compared, metrics=metrics, prompts=prompts, program=program, measured_by=[])
    with Claims(tmp_path, key="out") as claims:
        share.do(claims)
    (written,) = (tmp_path / "vbench/videos").glob(f"*/{CAT}-0.mp4")
    info, frames = read_frames(written, lambda info: range(info.num_frames))
    assert (info.fps, frames.shape) == (8, (3, 32, 48, 3))
    assert np.abs(frames.astype(int) - 120).max() <= 2
    assert share.values(case, "model") == {"object_class": pytest.approx(number_of(str(written)), rel=1e-15)}
