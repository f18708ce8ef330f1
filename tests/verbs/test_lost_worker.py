"""A process of `evaluate`, `generate`, `precompute` and `ptq` that is killed, fails or is stopped at an item."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path

import pytest

from qvgen.cli import BAD_INPUT, DONE, main
from tests.models.hub_folders import make_wan_folder
from tests.runs import shallow
from tests.training.distributed.launchers import start
from tests.verbs.lost_worker_program import MESSAGE
from tests.verbs.test_hub_models import tiny_keys, write_clips

PROMPTS = "[a red three moving up left,a blue five standing still,a green one moving right]"
ENDS = {
    "kill": r"was killed by signal SIGKILL at {item}: .* \(see .*rank1\.log\)",
    "fail": rf"ended with exit code {BAD_INPUT} at {{item}}: qvgen worker: {MESSAGE} \(see .*rank1\.log\)",
    "stop": r"has not reported since \S+ \d+ s ago: {item}: ended after (training\.)?hang_minutes=0\.1; stopped .*",
}


def words_of(verb: str, run: Path, folder: Path) -> list[str]:
    """A command of a verb with three or more items, for two processes."""
    if verb == "evaluate":
        own = [f"run_dir={run}", f"prompts={PROMPTS}", "seeds=1", "num_steps=1", "suite.metrics=[psnr]", "wandb=false"]
        own += [f"references={folder}/references", f"out={folder}/out"]
    elif verb == "generate":
        own = [f"packed={run / 'packed'}", f"prompt={PROMPTS}", "num_steps=1", f"out={folder}/out"]
    elif verb == "precompute":
        own = [
            *tiny_keys("wan", make_wan_folder(folder / "model")),
            f"data.path={write_clips(folder / 'clips', fps=16)}",
        ]
        own += [f"data.cache={folder}/out", f"run_dir={folder}/logs"]
    else:
        own = [
            *shallow(1),
            "init=gptq",
            "bits=3",
            "calibration.videos=3",
            "calibration.steps=1",
            "evaluation.samples=0",
        ]
        own += [f"calibration.cache={folder}/out", f"run_dir={folder}/run", "calibration.memory_gib=1"]
    return [verb, *own, "devices=2"]


def lost(words: list[str], how: str, folder: Path) -> tuple[int, str, str]:
    """Run a command whose rank 1 is lost; exit code, the line about it, and the item that it was at."""
    noted = folder / "item.txt"
    command = [sys.executable, "-m", "tests.verbs.lost_worker_program", *words]
    process = start(command, folder / "own.log", {"QVGEN_TEST_LOST": f"{noted}:{how}"})
    code = process.wait()
    lines = [line for line in (folder / "own.log").read_text().splitlines() if "rank 1 " in line]
    assert lines, (folder / "own.log").read_text()
    if how != "stop":  # which is warned of first
        assert len(lines) == 1, lines
    return code, lines[-1], noted.read_text()


def made(folder: Path) -> dict[str, int]:
    """When each file of results was written that is whole."""
    kinds = ("*.mp4", "*.safetensors", "records/*.json")
    return {
        str(file): file.stat().st_mtime_ns for kind in kinds for file in folder.rglob(kind) if "/." not in str(file)
    }


CHEAP = [("evaluate", "kill"), ("generate", "stop"), ("precompute", "fail"), ("ptq", "kill")]


def check(verb: str, how: str, run: Path, folder: Path) -> None:
    """It is named and ends the command, which goes on with what is there when it is typed again."""
    words = words_of(verb, run, folder)
    if how == "stop":
        words.append("training.hang_minutes=0.1" if verb == "ptq" else "hang_minutes=0.1")
    code, line, item = lost(words, how, folder)
    assert code == BAD_INPUT, line
    assert socket.gethostname() in line
    assert re.search(ENDS[how].format(item=re.escape(item)), line), line
    before = made(folder / "out")
    again = ["resume=true"] if verb == "ptq" else []
    assert main([*(word for word in words if "hang_minutes" not in word), *again]) == DONE
    after = made(folder / "out")
    kept = {file: date for file, date in after.items() if file in before}
    assert kept == {file: date for file, date in before.items() if file in after}
    assert after.keys() - before.keys()  # parts of a pass are deleted when they are joined


@pytest.mark.parametrize(("verb", "how"), CHEAP)
def test_it_is_named_and_the_same_command_goes_on(verb: str, how: str, short_run: Path, tmp_path: Path) -> None:
    check(verb, how, short_run, tmp_path)
