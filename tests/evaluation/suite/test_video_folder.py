"""Cases from names: seeds of noise, folders of videos and prompts that fit or do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qvgen.config.prompts.prompt import Prompts
from qvgen.data.video import write_video
from qvgen.errors import UserError
from qvgen.evaluation.suite.case import noise_seed, sampled_cases, spread
from qvgen.evaluation.suite.video_folder import check_same, folder_cases, read_folder

PROMPTS = Prompts.parse(["a red boat", {"prompt": "a dog", "seed": [7], "negative_prompt": "blurred"}], key="prompts")


def folder(path: Path, *names: str, frames: int = 2, side: int = 16, fps: float = 8) -> Path:
    for name in names:
        write_video(path / f"{name}.mp4", np.full((frames, side, side, 3), 90, dtype=np.uint8), fps=fps, scale=1)
    return path


def test_noise_belongs_to_prompt_and_index_alone() -> None:
    cases = sampled_cases(PROMPTS, seeds=2, negative="own")
    assert [(case.prompt, case.seed) for case in cases] == [
        (0, noise_seed("a red boat", 0)), (0, noise_seed("a red boat", 1)), (1, 7),
    ]  # fmt: skip
    assert [case.asked.negative for case in cases if case.asked] == ["own", "own", "blurred"]
    assert [case.seed for case in spread(cases)] == [cases[0].seed, 7, cases[1].seed]
    turned = sampled_cases(Prompts(PROMPTS.lines[::-1]), seeds=1, negative="own")
    assert turned[1].asked == cases[0].asked
    with pytest.raises(UserError, match="prompts holds 'a dog' twice with the seed 7; leave one out"):
        sampled_cases(Prompts((PROMPTS.lines[1],) * 2), seeds=1, negative="")


def test_files_are_cases_by_their_names(tmp_path: Path) -> None:
    clips = read_folder(folder(tmp_path, "00-a-red-boat-seed4-packed", "00-a-red-boat-seed5-packed"), key="videos")
    cases = folder_cases(clips, None, key="videos", seeds=None, negative="")
    assert [(case.name, case.prompt, case.seed) for case in cases] == [
        ("00-a-red-boat-seed4", 0, 4), ("00-a-red-boat-seed5", 0, 5),
    ]  # fmt: skip
    folder(tmp_path, "holiday")
    clips = read_folder(tmp_path, key="videos")
    assert [case.prompt for case in folder_cases(clips, None, key="videos", seeds=None, negative="")] == [0, 1, 2]
    with pytest.raises(UserError, match="videos: holiday can't be matched with prompts; name videos as"):
        folder_cases(clips, PROMPTS, key="videos", seeds=None, negative="")


@pytest.mark.parametrize(
    ("names", "seeds", "message"),
    [
        (
            ["00-a-red-boat-seed4", "01-a-cat-seed1"],
            None,
            "01-a-cat-seed1 is of no line of prompts; they would begin with 00-a-",
        ),
        (["00-a-red-boat-seed4"], None, r"lacks videos of prompts, or has too many: 01-a-dog \(0 of 1\)"),
        (["00-a-red-boat-seed4", "00-a-red-boat-seed5", "01-a-dog-seed1"], None, r"01-a-dog \(1 of 2\)"),
        (["00-a-red-boat-seed4", "01-a-dog-seed1"], 2, r"00-a-red-boat \(1 of 2\), 01-a-dog \(1 of 2\)"),
        (["00-a-red-boat-seed4-packed", "00-a-red-boat-seed4-teacher"], None, "holds two videos of one name"),
        ([], None, "holds no video"),
    ],
)
def test_files_that_do_not_fit_the_prompts_are_named(
    names: list[str], seeds: int | None, message: str, tmp_path: Path
) -> None:
    folder(tmp_path, *names)
    with pytest.raises(UserError, match=message):
        folder_cases(read_folder(tmp_path, key="videos"), PROMPTS, key="videos", seeds=seeds, negative="")


@pytest.mark.parametrize(
    ("names", "other", "message"),
    [
        (["a"], {}, "reference lacks 1 of the 2 videos: b"),
        (["a", "b", "c"], {}, "reference holds 1 videos that belong to nothing: c"),
        (
            ["a", "b"],
            {"frames": 3},
            "a: the video has 2 frames and the reference 3; compare videos of one shape and rate",
        ),
        (["a", "b"], {"side": 32}, "a: the video has 16x16 pixels and the reference 32x32"),
        (["a", "b"], {"fps": 4}, "a: the video has 8 frames a second and the reference 4"),
    ],
)
def test_folders_that_do_not_fit_are_named(
    names: list[str], other: dict[str, int], message: str, tmp_path: Path
) -> None:
    videos = read_folder(folder(tmp_path / "videos", "a", "b"), key="videos")
    reference = read_folder(folder(tmp_path / "reference", *names, **other), key="reference")
    with pytest.raises(UserError, match=message):
        check_same(videos, reference)
