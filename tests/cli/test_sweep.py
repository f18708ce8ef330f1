"""Folders of a sweep's jobs: named by what differs, safe, short, and never one for two jobs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qvgen.config.compose import compose_plain, expand_sweep
from qvgen.config.positional import name_positionals
from qvgen.config.sweep import MOST_CHARACTERS, job_names, separate_folders


def folders(verb: str, jobs: list[list[str]], given: list[str]) -> list[str]:
    """The folders of jobs that would have had these."""
    key = {"train": "run_dir", "ptq": "run_dir", "generate": "out"}[verb]
    plains = [{"seed": 1, key: folder} for folder in given]
    found = separate_folders(verb, plains, jobs)
    assert all(plain["seed"] == 1 for plain in found)
    return [str(plain[key]) for plain in found]


def test_jobs_of_a_sweep_lie_together_under_what_differs() -> None:
    jobs = expand_sweep(["seed=1,2", "optim.learning_rate=0.001,0.01", "steps=7"], multirun=True)
    assert folders("train", jobs, [f"outputs/tiny-3-qvgen/time{index}" for index in range(4)]) == [
        f"outputs/tiny-3-qvgen/time0/{name}"
        for name in ("seed-1_learning_rate-0.001", "seed-1_learning_rate-0.01", "seed-2_learning_rate-0.001",
                     "seed-2_learning_rate-0.01")
    ]  # fmt: skip


def test_jobs_of_several_models_or_widths_lie_in_one_folder_too() -> None:
    jobs = expand_sweep(["bits=4,w4a8", "method=lsq"], multirun=True)
    assert folders("ptq", jobs, ["outputs/tiny-4-lsq/t0", "outputs/tiny-w4a8-lsq/t1"]) == [
        "outputs/sweep/t0/bits-4", "outputs/sweep/t0/bits-w4a8",
    ]  # fmt: skip


@pytest.mark.parametrize("verb", ["train", "ptq"])
def test_a_folder_that_was_typed_is_not_shared(verb: str) -> None:
    def typed(folder: str, seeds: str, given: list[str]) -> list[str]:
        return folders(verb, expand_sweep([f"run_dir={folder}", f"seed={seeds}"], multirun=True), given)

    assert typed("x", "1,2", ["x", "x"]) == ["x/seed-1", "x/seed-2"]
    assert typed("x/s${seed}", "1,2", ["x/s1", "x/s2"]) == ["x/s1", "x/s2"]  # they differ as they were typed
    assert typed("a,b", "1", ["a", "b"]) == ["a", "b"]
    assert typed("a,b", "1,2", ["a", "a", "b", "b"]) == ["a/seed-1", "a/seed-2", "b/seed-1", "b/seed-2"]
    assert len({str(Path(path).resolve()) for path in typed("a,./b/../a", "1", ["a", "./b/../a"])}) == 2
    assert folders(verb, [["seed=1"], ["seed=2"]], ["from/an/experiment"] * 2) == [
        "from/an/experiment/seed-1", "from/an/experiment/seed-2",
    ]  # fmt: skip


def test_videos_of_two_jobs_do_not_overwrite_each_other() -> None:
    jobs = [["packed=a/packed"], ["packed=b/packed"]]
    assert folders("generate", jobs, ["generated"] * 2) == ["generated/packed-a-packed", "generated/packed-b-packed"]


def test_one_job_and_other_verbs_are_left_as_they_are() -> None:
    assert folders("train", [["seed=1"]], ["outputs/x/t0"]) == ["outputs/x/t0"]
    plains = [{"run_dir": "x"}, {"run_dir": "x"}]
    assert separate_folders("inspect", plains, [["a=1"], ["a=2"]]) == plains


@pytest.mark.parametrize(
    "jobs",
    [
        [["seed=1"], ["seed=1"]],
        [["prompt=a b"], ["prompt=a/b"], ["prompt=a  b"]],
        [["data.path=clips/A"], ["data.path=clips/a"]],  # one folder on a Mac
        [["data.path=.."], ["data.path=/"]],
        [["model.path=" + "x" * 300], ["model.path=" + "x" * 299 + "y"]],
        [["phi.ranks=[32,8]", "a=1"], ["phi.ranks=[32,8,2]", "a=1"]],
        [["x=日本"], ["x=中国"]],
        [["+data.x=1", "data.y=2"], ["+data.x=2", "data.y=2"]],
    ],
    ids=str,
)
def test_names_are_safe_short_and_distinct(jobs: list[list[str]]) -> None:
    names = job_names(jobs)
    assert len({name.lower() for name in names}) == len(jobs)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name), name
        assert len(name) <= MOST_CHARACTERS
        assert expand_sweep([f"run_dir=outputs/{name}"], multirun=False) == [
            [f"run_dir=outputs/{name}"]
        ]  # hydra reads it


def test_keys_that_end_alike_are_named_whole() -> None:
    assert job_names([["a.rank=1", "b.rank=2"], ["a.rank=2", "b.rank=1"]]) == ["a.rank-1_b.rank-2", "a.rank-2_b.rank-1"]


def test_names_do_not_depend_on_the_other_values() -> None:
    assert job_names([["seed=1"], ["seed=2"]])[0] == job_names([["seed=1"], ["seed=3"], ["seed=4"]])[0]


def test_words_without_a_key_are_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1").mkdir()
    assert name_positionals("compare", ["--cfg", "job", "a", "lr=0.1", "out=x", "debug=true"]) == [
        "runs=['a','lr=0.1']", "--cfg", "job", "out=x", "debug=true",
    ]  # fmt: skip
    named = name_positionals("compare", ["it's, [a] ${b}\\", "x=y/z"])
    assert compose_plain("compare", named[:1])["runs"] == ["it's, [a] ${b}\\"]
    assert named[1:] == ["x=y/z"]  # an unknown key, which is refused as such
    assert name_positionals("train", ["seed=1"]) == ["seed=1"]
