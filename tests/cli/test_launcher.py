"""Sweeps through a launcher of Hydra's plug-in API: each job a process tree of its own, and the sweep ends as ours do.

The launcher is a real plug-in (tests/launcher), found in the namespace `hydra_plugins` as an installed one is.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qvgen.cli import BAD_INPUT, BUG, DONE, TERMINATED, main
from qvgen.config.compose import expand_sweep
from qvgen.config.flags import parse_flags
from qvgen.config.hydra_program import run_job
from qvgen.errors import UserError
from tests.runs import SHORT, UNSEEN, shallow

PLUGIN = Path(__file__).resolve().parents[1] / "launcher"
BACKWARDS = "hydra/launcher=backwards"


def sweep(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of its own, which finds the plug-in as it finds all that is installed."""
    path = os.pathsep.join([str(PLUGIN), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-m", "qvgen.cli", *words],
        cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_each_job_is_a_command_of_its_own_in_the_folder_of_the_sweep(tmp_path: Path) -> None:
    short = [word for word in SHORT if not word.startswith(("steps", "phi"))]
    done = sweep(tmp_path, "ptq", "-m", "seed=1,2", "init=rtn", "run_dir=runs", *short, *UNSEEN, *shallow(1), BACKWARDS)
    assert done.returncode == DONE, done.stderr
    reports = [json.loads((tmp_path / "runs" / f"seed-{seed}" / "report.json").read_text()) for seed in (1, 2)]
    assert [report["seed"] for report in reports] == [1, 2]
    lines = done.stdout.splitlines()
    first, second = (
        next(i for i, line in enumerate(lines) if f"runs/seed-{seed}/report.html" in line) for seed in (2, 1)
    )
    assert first < second  # the launcher's order
    assert (tmp_path / "runs" / "compare.html").is_file()
    assert "compare.html" in lines[-1]
    command = reports[0]["command"]
    assert "seed=1" in command
    assert "hydra" not in command  # what does this job again, alone
    (folder,) = (tmp_path / "outputs" / "launch").iterdir()
    assert {file.name: file.read_text() for file in folder.glob("*.exit")} == {"0.exit": "0", "1.exit": "0"}


def test_the_worst_code_counts_and_a_job_that_was_not_run_is_named(tmp_path: Path) -> None:
    words = ("inspect", "-m", "packed=first,second", BACKWARDS)
    done = sweep(tmp_path, *words, "hydra.launcher.leave=0")
    assert done.returncode == BUG
    assert "second/manifest.json is missing" in done.stderr
    assert "first/manifest.json" not in done.stderr
    assert "qvgen inspect: the launcher did not bring job 0 to its end" in done.stderr.splitlines()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-m", "packed=a,b", "hydra/launcher=jobli"], "unknown hydra/launcher=jobli (there are: "),
        (["packed=a", "hydra/launcher=basic"], "hydra/launcher=basic starts the jobs of a sweep; add -m"),
        (["-m", "packed=a,b", "hydra.launcher.n_jobs=2"], "hydra.launcher.n_jobs=2 needs a launcher"),
        (["-m", "packed=a,b", "hydra.sweep.dir=x"], "hydra.sweep.dir has no effect here"),
        (["-m", "packed=a,b", "hydra/sweeper=optuna"], "hydra/sweeper has no effect here"),
        (["--multirum"], "unknown flag --multirum; did you mean '--multirun'?"),
        (["--cfg", "jobs"], "invalid choice: 'jobs'"),
        (["--config-name", "x"], "--config-name can't be used here: the verb names it"),
    ],
)
def test_what_a_sweep_can_not_do_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *words]) == BAD_INPUT
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_built_in_launcher_is_our_own_sweep(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["inspect", "-m", "packed=first,second", "hydra/launcher=basic"]) == BAD_INPUT
    shown = capsys.readouterr().err.splitlines()
    assert ["first" in shown[0], "second" in shown[1], len(shown)] == [True, True, 2]


def test_flags_have_the_names_that_hydras_users_know() -> None:
    flags = parse_flags(["-m", "a=1,2", "-cd", "conf", "hydra/launcher=x", "b=3", "+hydra.launcher.n_jobs=2"])
    assert (flags.multirun, flags.config_dir, flags.overrides) == (True, "conf", ["a=1,2", "b=3"])
    assert flags.launcher == ["hydra/launcher=x", "+hydra.launcher.n_jobs=2"]
    flags = parse_flags(["--info", "--cfg", "job", "-p", "phi", "--resolve"])
    assert (flags.info, flags.cfg, flags.package, flags.resolve, flags.launcher) == ("all", "job", "phi", True, [])


def test_a_sweep_has_every_combination_in_its_order() -> None:
    jobs = expand_sweep(["seed=1,2", "steps=range(2,4)", "bits=4", "seed=3,4"], multirun=True)
    assert jobs == [
        ["seed=3", "steps=2", "bits=4"], ["seed=3", "steps=3", "bits=4"],
        ["seed=4", "steps=2", "bits=4"], ["seed=4", "steps=3", "bits=4"],
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"optim.eps=interval\(0,1\) names no values; write for example optim.eps=1,2"):
        expand_sweep(["optim.eps=interval(0,1)"], multirun=True)


PARENT = """
import sys
from pathlib import Path
from qvgen.config.hydra_program import run_job
child = "import signal, sys, time\\n" \\
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\\n" \\
    "open('begun', 'w').close(); time.sleep(60)"
run_job([sys.executable, "-c", child], python_path="", code_file=Path("0.exit"))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_job_is_asked_to_stop_when_its_launcher_is_stopped_or_killed(number: int, tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, sys.path))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.DEVNULL,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (child,) = [int(number) for number in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
    parent.send_signal(number)
    parent.wait()
    while Path(f"/proc/{child}").exists() and "State:\tZ" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if number == signal.SIGINT:
        assert (tmp_path / "0.exit").read_text() == str(TERMINATED)


def test_the_code_of_a_job_that_a_signal_ended_is_the_shells(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    run_job(command, python_path="", code_file=tmp_path / "0.exit")
    assert (tmp_path / "0.exit").read_text() == str(128 + signal.SIGKILL)


def test_nothing_of_hydras_inside_is_used() -> None:
    """It may change with any version; what the plug-ins' and the program's interface has is enough."""
    root = Path(__file__).resolve().parents[2]
    files = [path for folder in ("qvgen", "kernels", "tests") for path in (root / folder).rglob("*.py")]
    assert len(files) > 400
    inside = re.compile(r"^\s*(from|import) hydra\." + "_internal", re.MULTILINE)
    assert not [path for path in files if inside.search(path.read_text(encoding="utf-8"))]
