"""docs/extending.md: its files are written as the page has them, and its commands are run, shortened to seconds."""

from __future__ import annotations

import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qvgen.cli import main
from qvgen.config.plugins import find_plugins
from qvgen.data.moving_digits import MovingDigits
from qvgen.data.video import write_video
from qvgen_kernels import registry
from tests.runs import SHORT, shallow

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"
FILES = dict(re.findall(r"^`(\S+)`\n\n```\w+\n(.*?)```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for line in block.splitlines()
]
KEYS = [key for key in SHORT if not key.startswith(("steps", "phi", "evaluation.videos"))]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The present folder with all files of the page, clips, and the package as if it were installed."""
    folder = tmp_path_factory.mktemp("extending")
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    digits = MovingDigits(split="train", length=40, image_size=16, num_frames=8, step_pixels=4)
    clips = [digits[index] for index in range(len(digits))]
    frames = [((clip["video"] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy() for clip in clips]
    np.save(folder / "clips.npy", np.stack(frames))
    (folder / "clips.txt").write_text("\n".join(clip["caption"] for clip in clips))
    project = tomllib.loads(FILES["pyproject.toml"])["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    sections = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(sections))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.chdir(folder)
        patch.setattr(registry, "_backends", dict(registry._backends))
        patch.setattr(registry, "_made", {})
        for cached in (find_plugins, registry._load_installed):
            cached.cache_clear()
        yield folder
    for cached in (find_plugins, registry._load_installed):
        cached.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("mine", "qvgen_mymethod")]:
        del sys.modules[name]


def test_the_page_has_an_example_of_each_kind() -> None:
    assert {Path(name).parent.name for name in FILES if name.endswith(".yaml")} == {
        "init", "method", "model", "data", "callbacks", "logger", "metric",
    }  # fmt: skip
    assert len(COMMANDS) == 10
    assert all(f'"{group}"' in FILES["pyproject.toml"] for group in ("qvgen.plugins", "qvgen_kernels.backends"))


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[1:4]))
def test_a_command_of_the_page_runs(words: list[str], project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of each kind to its end; of the others, which are variants of them, all but the computation."""
    assert words[0] == "qvgen"
    if words[1] == "evaluate":
        write_video(project / "videos" / "a.mp4", np.load("clips.npy")[0], fps=4)
        assert main([*words[1:], f"out={project / 'evaluation'}"]) == 0
        found = json.loads((project / "evaluation" / "evaluation.json").read_text())["metrics"]
        assert 10 < found["contrast"]["value"] < 128
        return
    run_dir = project / "runs" / str(COMMANDS.index(words))
    length = ["steps=2"] if "method=robust" in words else ["steps=2", "phi.ranks=[2]"] if words[1] == "train" else []
    is_variant = any("_target_" in word or word in ("init=mymethod", "model=still", "logger=table") for word in words)
    length += () if any(word.startswith("model") for word in words) else shallow(1)
    keys = [
        *KEYS,
        *length,
        "evaluation.videos=0",
        "evaluation.start_videos=false",
        f"run_dir={run_dir}",
        f"dry_run={is_variant}".lower(),
    ]
    assert main([*words[1:], *keys]) == 0
    named = {word.partition("=")[0]: word.rpartition("=")[2].rpartition(".")[2] for word in words if "=" in word}
    chosen = {group: named.get(f"{group}._target_", named.get(group)) for group in ("init", "method", "model")}
    if is_variant:
        shown = capsys.readouterr().out
        assert all(f"{group}={name}" in shown for group, name in chosen.items() if name is not None)
        return
    text = (run_dir / "report.json").read_text()
    report = json.loads(text)
    assert report["packed_codes_equal"] is True
    assert all(report[group] == name for group, name in chosen.items() if name is not None)
    assert ('"blocks"' in text) == ("kernel" in named)
