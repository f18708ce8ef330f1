"""The command that does a job again: checked with a shell's own splitting and with hydra's own reading."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from qvgen.config.command_line import _program, begin_job, command_line, job_command, parts_of_job
from qvgen.config.compose import compose_plain, expand_sweep

TYPED = [
    "bits=w4a8",
    "prompt=a 'red' three, moving",
    "++phi.rank=8",
    "--config-dir",
    "my conf",
    "run_dir=x",
    "resume=true",
]


def words(line: str) -> list[str]:
    """As a POSIX shell splits it."""
    return shlex.split(line)


def test_what_was_typed_comes_back_word_for_word() -> None:
    assert words(command_line("train", TYPED)) == ["qvgen", "train", *TYPED]


def test_jobs_keep_what_was_typed_but_for_what_is_swept() -> None:
    typed = ["prompt='a b'", "seed=1,2", "x=[1, 2]", "++y=false", "~z"]
    assert expand_sweep(typed, multirun=True) == [[typed[0], f"seed={seed}", *typed[2:]] for seed in (1, 2)]
    assert expand_sweep(["bits=4", "bits=3,2"], multirun=True)[-1][-1] == "bits=2"
    assert expand_sweep(["steps=12", "bits=3", "steps=3"], multirun=False) in (
        [["steps=12", "bits=3", "steps=3"]],
        [["steps=3", "bits=3"]],  # the last one counts
    )


def test_the_present_job_has_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvgen.config.command_line._job", ("", ()))
    begin_job("ptq", ["bits=4", "seed=1"])
    assert job_command(changes={"seed": 2}) == "qvgen ptq bits=4 seed=2"
    with pytest.raises(KeyError), parts_of_job():
        raise KeyError
    assert job_command(changes={"seed": 2}) == "qvgen ptq bits=4 seed=1"  # a part ended the job
    begin_job("ptq", ["bits=4", "seed=1"])
    with parts_of_job():
        assert job_command(changes={"seed": 2}) == "qvgen ptq bits=4 seed=1"
    assert job_command(changes={"seed": 2}) == "qvgen ptq bits=4 seed=2"


def test_changes_stand_once_in_place_of_what_was_typed() -> None:
    line = command_line("train", TYPED, changes={"run_dir": Path("runs/one"), "resume": True, "phi.rank": 4})
    assert words(line)[2:] == [*TYPED[:2], *TYPED[3:5], "run_dir=runs/one", "resume=true", "phi.rank=4"]
    again = command_line("train", words(line)[2:], changes={"run_dir": "runs/one", "resume": True, "phi.rank": 4})
    assert again == line


AWKWARD = (
    "outputs/tiny-w3a3-qvgen/20260131-235959-123456", "a b", "it's", "a=b,c", "[x]", "{y}", "7", "-1e5", "true", "null",
    "nan", "1_0", "back\\slash", "end\\", "quote\\'", "${seed}", "~/runs", "ü/日本", "#1", "a:b", '"', "$HOME", "(z)", "-inf",
)  # fmt: skip


def reread(text: str) -> str:
    """What hydra and omegaconf make of a command's run_dir."""
    (override,) = words(command_line("train", [], changes={"run_dir": text}))[2:]
    value = OverridesParser.create().parse_override(override).value()
    plain = getattr(value, "text", value)
    assert isinstance(plain, str), override
    return OmegaConf.create({"seed": 1, "run_dir": plain}).run_dir


@pytest.mark.parametrize("text", AWKWARD)
def test_a_folder_of_any_name_is_read_back_as_it_is(text: str) -> None:
    assert reread(text) == text


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), min_size=1, max_size=12))
def test_any_text_is_read_back_as_it_is(text: str) -> None:
    assume("\\${" not in text)
    assert reread(text) == text


def test_a_whole_command_is_composed_as_it_stands() -> None:
    (override,) = words(command_line("train", [], changes={"run_dir": "it's ${seed}, 7"}))[2:]
    assert compose_plain("train", [override])["run_dir"] == "it's ${seed}, 7"


@pytest.mark.parametrize(
    ("typed", "argv0", "verb", "expected"),
    [
        (["python", "train.py", "bits=3"], "train.py", "train", ["python", "train.py"]),
        (["./python", "-u", "q/train.py", "bits=3"], "q/train.py", "train", ["./python", "-u", "q/train.py"]),
        (["python", "-m", "qvgen.cli", "ptq", "bits=3"], "/there/qvgen/cli.py", "ptq", ["python", "-m", "qvgen.cli", "ptq"]),
        (["python", "/usr/bin/pytest", "tests"], "/usr/bin/pytest", "train", ["qvgen", "train"]),
        (["/nowhere/bin/python", "/nowhere/bin/qvgen", "ptq"], "/nowhere/bin/qvgen", "ptq", ["/nowhere/bin/qvgen", "ptq"]),
    ],
)  # fmt: skip
def test_the_program_is_the_one_that_was_called(typed: list[str], argv0: str, verb: str, expected: list[str]) -> None:
    arguments = typed[typed.index(argv0) + 1 :] if argv0 in typed else typed[3:]
    assert _program(verb, argv=[argv0, *arguments], orig_argv=typed) == expected


def test_the_shells_own_name_is_used_where_it_finds_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "qvgen"
    shutil.copy(sys.executable, script)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _program("ptq", argv=[str(script)], orig_argv=[sys.executable, str(script)]) == ["qvgen", "ptq"]
