"""Text on the command line: what an error tells to write is read by the shell and by the grammar as that very text.

Checked by a real `sh` and by composing the configuration.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from qvgen.cli import BAD_INPUT, main
from qvgen.config.compose import compose_plain, expand_sweep
from qvgen.config.quoting import command_word, is_single_text_key, is_text_key, suggested_word
from qvgen.errors import UserError

TEXTS = [
    "a red three, moving left", "a cat's hat, red", 'say "hi", then go', "both \"kinds\" of a dog's marks", "一只猫",
    "a (b) c", "[a, b", "{a: b}", "007", "1e3", "true", "null", "${x} and $y", "\\${x}", "C:\\dir\\", 'a\\"b', "a: b",
    "50% & more; #1!",
    "don't stop!", "/data/set [v2]/x=1,y", "", " a ", "a `b` $(c)", "~/x", "tab\there",
]  # fmt: skip


def read_by_the_shell(words: Sequence[str]) -> list[str]:
    lines = "\n".join(f"printf '%s\\0' {word}" for word in words)
    found = subprocess.run(["sh", "-c", lines], capture_output=True, text=True, check=True).stdout
    return found.split("\0")[:-1]


def value(word: str) -> object:
    """What the grammar and then omegaconf make of a word."""
    parsed = OverridesParser.create().parse_override(word)
    return OmegaConf.create({"value": parsed.value()}).value


def test_a_suggested_word_is_that_text_to_shell_and_grammar() -> None:
    for text, word in zip(
        TEXTS, read_by_the_shell([command_word("negative_prompt", text) for text in TEXTS]), strict=True
    ):
        assert value(word) == text
    (word,) = read_by_the_shell([command_word("prompt", TEXTS)])
    assert compose_plain("generate", ["model=tiny", word])["prompt"] == TEXTS


@settings(max_examples=40, deadline=None)
@given(st.text(alphabet="a \\\"'${}[](),=:!`", max_size=12))
@example("\\\\")
@example('\\"\\')
def test_any_text_can_be_written(text: str) -> None:
    (word,) = read_by_the_shell([command_word("k", text)])
    (job,) = expand_sweep([word], multirun=False)
    assert value(word) == value(job[0]) == text


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["prompt=a red three, moving left"], "'prompt=\"a red three, moving left\"'; add -m to run one job for each"),
        (["negative_prompt=blurred,grey"], "'negative_prompt=\"blurred,grey\"'; add -m"),
        (["prompt=choice(a, b)"], "'prompt=\"choice(a, b)\"'; add -m"),
        (["out=/data/a,b"], "'out=\"/data/a,b\"'; add -m"),
        (["model=wan", "model.path=/a,b"], "'model.path=\"/a,b\"'; add -m"),
        (["model=wan", "+model.new=x, y"], "'+model.new=\"x, y\"'; add -m"),
        (["prompt=a cat's hat"], 'for this text write "prompt=\\"a cat\'s hat\\""'),
        (["prompt=一只猫"], "for this text write 'prompt=\"一只猫\"'"),
        (["prompt=a (b) c"], "for this text write 'prompt=\"a (b) c\"'"),
        (["out=/data/x=1"], "for this text write 'out=\"/data/x=1\"'"),
        (["out=/data/set [v2]"], "for this text write 'out=\"/data/set [v2]\"'"),
        (["out=~/videos"], "for this text write 'out=\"~/videos\"'"),
        (["prompt=[a cat; asleep, a dog]"], 'for this text write \'prompt=["a cat; asleep","a dog"]\''),
        (["prompt={a: b}"], "is read as a section; for this text write 'prompt=\"{a: b}\"'"),
        (["negative_prompt=[grey]"], "is read as a list; for this text write 'negative_prompt=\"[grey]\"'"),
        (["prompt=a", "red", "three,", "moving"], "if it belongs to prompt, write 'prompt=\"a red three, moving\"'"),
        (["prompt=costs ${x}"], "for ${ itself write 'prompt=\"costs \\${x}\"'"),
    ],
)
def test_the_error_says_the_exact_word(words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *(["model=tiny"] if "model=wan" not in words else []), *words]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert hint in line


def test_what_is_no_text_is_told_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in {
        "bits=4,3": "bits=4,3 names several values; add -m to run one job for each",
        "bits": "cannot read 'bits'; write key=value",
        "a b=1": "cannot read 'a b=1': 'a b' is no key; write key=value",
    }.items():
        assert main(["train", words]) == BAD_INPUT
        assert capsys.readouterr().err == f"qvgen train: {message}\n"


def test_a_sweep_over_text_says_that_it_is_one(caplog: pytest.LogCaptureFixture) -> None:
    jobs = expand_sweep(["prompt=a red three, moving left", "seed=1,2", "out=a,b"], multirun=True)
    assert len(jobs) == 8
    (warning,) = caplog.messages
    assert warning.startswith("prompt is a sweep")
    assert warning.endswith("write 'prompt=\"a red three, moving left\"'")


@pytest.mark.parametrize("written", ["1e3", "007", "true", "1_000", "-5", "1.50", "Nan"])
def test_text_that_looks_like_a_number_is_what_was_written(written: str) -> None:
    words = [
        f"run_dir={written}",
        "calibration.cache=1e3",
        "seed=1_0",
        "model=wan",
        f"model.path={written}",
        "model.shift=5",
    ]
    (job,) = expand_sweep(words, multirun=False)
    assert [value(word) for word in job] == [written, "1e3", 10, "wan", written, 5]


def test_what_is_written_is_composed() -> None:
    plain = compose_plain("train", ["run_dir=1e3", "model=wan", "model.path=2024", "model.shift=5"])
    assert (plain["run_dir"], plain["model"]["path"], plain["model"]["shift"]) == ("1e3", "2024", 5)


def test_which_keys_are_text() -> None:
    texts = [
        "prompt",
        "negative_prompt",
        "out",
        "run_dir",
        "evaluation.prompts",
        "model.lora",
        "data.path",
        "calibration.cache",
    ]
    assert all(map(is_text_key, texts))
    assert not is_single_text_key("packed")  # one directory to inspect, two to generate
    assert [key for key in texts if not is_single_text_key(key)] == [
        "prompt",
        "evaluation.prompts",
        "model.lora",
        "data.path",
    ]
    assert not any(
        map(
            is_text_key,
            ["bits", "seed", "model.shift", "phi.anneal", "optim.name", "steps", "names.model", "kernel", "methods"],
        )
    )


def test_a_text_in_quotation_marks_gets_no_second_pair() -> None:
    assert (
        suggested_word("k", "'a, b'") == suggested_word("k", '"a, b"') == suggested_word("k", "a, b") == "'k=\"a, b\"'"
    )


def test_a_bad_override_of_several_is_named() -> None:
    with pytest.raises(UserError, match=r"cannot read 'seed=@@\['; for this text write 'seed=\"@@\[\"'"):
        expand_sweep(["prompt=a cat", "seed=@@["], multirun=False)
