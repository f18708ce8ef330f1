"""Prompts as captions, objects and files: what is read, what is refused by file and line, whose seeds count.

Checked against lists written out by hand; a run's own configuration holds what its file held when it was composed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qvgen.config.build import check
from qvgen.config.compose import compose_plain
from qvgen.config.prompts.line import Prompt
from qvgen.config.prompts.prompt import PromptedVideo, Prompts
from qvgen.config.schema.train import TrainConfig
from qvgen.errors import UserError
from tests.runs import train_config

LINES = (
    '{"prompt": "a red boat, drifting", "seed": 3}\n'
    "\n"
    '  {"prompt": "一只猫", "seed": [1, 2], "negative_prompt": "blurred"}  \r\n'
    '{"prompt": "a dog", "negative_prompt": ""}'
)
PROMPTS = Prompts(
    (
        Prompt(caption="a red boat, drifting", seeds=(3,)),
        Prompt(caption="一只猫", seeds=(1, 2), negative="blurred"),
        Prompt(caption="a dog", negative=""),
    )
)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def parse(value: Any) -> Prompts:
    return Prompts.parse(value, key="prompts")


@pytest.mark.parametrize(
    ("content", "captions"),
    [
        ("a dog\n\n  two boats \n", ["a dog", "two boats"]),
        (b"\xef\xbb\xbfa dog\r\nsunset", ["a dog", "sunset"]),  # a byte order mark, CRLF
        ("a dog\rtwo\u2028boats", ["a dog", "two\u2028boats"]),  # CR; another kind of line is no line of a file
        ("a red three, moving left\n", ["a red three, moving left"]),
        ('say "hi", {then} go\n"quoted"', ['say "hi", {then} go', '"quoted"']),
        ("a dog\na dog", ["a dog", "a dog"]),
    ],
)
def test_a_text_file_has_one_caption_to_a_line(content: str | bytes, captions: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, "prompts.txt", content)
    assert parse(str(path)) == Prompts.of(captions)
    assert parse([str(path)]) == parse(str(path.rename(tmp_path / "prompts"))) == Prompts.of(captions)


def test_a_jsonl_file_has_seeds_and_negative_prompts(tmp_path: Path) -> None:
    assert parse(str(write(tmp_path, "prompts.jsonl", LINES))) == PROMPTS
    assert parse(PROMPTS.plain()) == PROMPTS
    assert PROMPTS.captions == ["a red boat, drifting", "一只猫", "a dog"]
    assert PROMPTS.texts() == [*PROMPTS.captions, "blurred", ""]
    words = Prompts.of(["sunset"])
    assert parse(words.plain()) == words  # one word, which alone would be a file's name


def test_a_list_is_captions_or_objects() -> None:
    assert parse(["a dog", 7, "sunset"]) == Prompts.of(["a dog", "7", "sunset"])
    assert parse("a dog") == Prompts.of(["a dog"])
    assert parse(["sunset"]) == Prompts.of(["sunset"])  # alone it would be a file's name
    assert parse("一只猫") == Prompts.of(["一只猫"])  # no spaces, and no file's name
    assert parse([{"prompt": "a dog", "seed": 1}]) == Prompts((Prompt(caption="a dog", seeds=(1,)),))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"prompt": "a dog", "sed": 1}',
            "FILE:2: unknown key 'sed'; did you mean 'seed'? (there are: prompt, seed, negative_",
        ),
        ('{"caption": "a dog"}', "FILE:2: unknown key 'caption' (there are: prompt, seed, negative_prompt, image)"),
        ('{"seed": 1}', 'FILE:2 has no "prompt"; write for example {"prompt": "a cat"}'),
        ('{"prompt": 7}', "FILE:2: 7 is no text; write a caption, in quotes"),
        ('{"prompt": " "}', "FILE:2 is an empty caption"),
        ('{"prompt": "a", "seed": "1"}', "FILE:2: seed=1 is no whole number in 0..4294967295"),
        ('{"prompt": "a", "seed": true}', "FILE:2: seed=true is no whole number"),
        ('{"prompt": "a", "seed": -1}', "FILE:2: seed=-1 is no whole number"),
        ('{"prompt": "a", "seed": 4294967296}', "FILE:2: seed=4294967296 is no whole number"),
        ('{"prompt": "a", "seed": [1, 1.5]}', "FILE:2: seed=1.5 is no whole number"),
        ('{"prompt": "a", "seed": []}', "FILE:2: seed=[] is empty; leave it out"),
        ('{"prompt": "a", "seed": [1, 1]}', "FILE:2: seed=[1, 1] names one twice"),
        ('{"prompt": "a", "negative_prompt": 3}', 'FILE:2: negative_prompt=3 is no text; write "" for none'),
        ('{"prompt": "a", "prompt": "b"}', "FILE:2 says 'prompt' twice; leave one out"),
        ('{"prompt": "a"', "FILE:2 is no JSON (Expecting ',' delimiter at character 15)"),
        ('"a dog"', 'FILE:2 is no object: "a dog"; write lines like {"prompt": "a cat"}'),
        ("[" * 3000, "FILE:2 is no JSON"),
        ('{"prompt": "a", "seed": ' + "1" * 5000 + "}", "FILE:2 is no JSON (Exceeds the limit"),
        ('{"prompt": "\\ud800"}', "FILE:2: '\\ud800' holds half of a character"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, "prompts.jsonl", f'{{"prompt": "a cat"}}\n{line}\n')
    with pytest.raises(UserError) as caught:
        parse(str(path))
    assert message.replace("FILE", str(path)) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n \n", "prompts=FILE holds no caption; write one to a line"),
        ("p.jsonl", "", "prompts=FILE holds no caption"),
        (
            "p.txt",
            "a dog".encode("utf-16"),
            "can't be read as a text file (it is UTF-16; convert it with `iconv -f UTF-16 -t",
        ),
        ("p.txt", "a dog\ncaf\xe9\n".encode("latin-1"), "(line 2 is no UTF-8: byte 0xe9; save it as UTF-8)"),
        ("p.txt", b"a\nb\0c", "(line 2 holds a zero byte"),
        ("p.txt", 'a dog\n{"prompt": "a"}', "FILE:2 looks like JSON; give the file a name that ends in .jsonl"),
        (
            "p.csv",
            "file_name,text\n",
            "prompts=FILE can't be read as a text file of prompts: write one caption to a line",
        ),
        ("p.json", "[]", "or a .jsonl file with lines like"),
    ],
)
def test_a_file_that_is_none_of_prompts_is_refused(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(UserError) as caught:
        parse(str(path))
    assert message.replace("FILE", str(path)) in str(caught.value)


@pytest.mark.parametrize("name", ["prompts.txt", "prompt", "deep/er.jsonl", "~nobody-here/prompts.txt", "."])
def test_a_file_that_is_not_there_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"can't be read as a text file \((No such file|Is a directory)"):
        parse(name)


def test_a_lines_seeds_count_before_the_runs() -> None:
    found = PROMPTS.videos([8, 9])
    assert found == [
        PromptedVideo(caption="a red boat, drifting", seed=3),
        PromptedVideo(caption="一只猫", seed=1, negative="blurred"),
        PromptedVideo(caption="一只猫", seed=2, negative="blurred"),
        PromptedVideo(caption="a dog", seed=8, negative=""),
        PromptedVideo(caption="a dog", seed=9, negative=""),
    ]


def test_in_turn_no_video_comes_twice() -> None:
    """Lines without seeds have the run's seed plus their place, as lists of captions always had."""
    found = PROMPTS.in_turn(7, first_seed=42)
    assert [(video.caption, video.seed) for video in found] == [
        ("a red boat, drifting", 3), ("一只猫", 1), ("一只猫", 2), ("a dog", 45),
        ("a red boat, drifting", 46), ("一只猫", 47), ("一只猫", 48),
    ]  # fmt: skip
    assert PROMPTS.num_videos == 4
    plain = Prompts.of(["a", "b"]).in_turn(3, first_seed=5)
    assert [(video.caption, video.seed, video.negative) for video in plain] == [
        ("a", 5, None),
        ("b", 6, None),
        ("a", 7, None),
    ]


def test_a_run_keeps_what_its_file_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(
        tmp_path, "mine.jsonl", '{"prompt": "a red three moving up", "seed": 5}\n{"prompt": "a blue six moving up"}'
    )
    plain = compose_plain("train", [f"evaluation.prompts={path}", f"calibration.prompts={path}"])
    path.unlink()
    monkeypatch.chdir("/")
    held = [{"prompt": "a red three moving up", "seed": [5]}, "a blue six moving up"]
    assert plain["evaluation"]["prompts"] == plain["calibration"]["prompts"] == held
    config = check("train", plain)
    assert isinstance(config, TrainConfig)
    assert config.evaluation.prompts == config.calibration.prompts
    assert config.evaluation.prompts is not None
    assert config.evaluation.prompts.lines[0] == Prompt(caption="a red three moving up", seeds=(5,))
    with pytest.raises(UserError, match=r"evaluation.prompts=.*mine.jsonl can't be read as a text file"):
        train_config(f"evaluation.prompts={path}")
