"""A forked Python process against one that was started: it is given the same, and ends in the same ways."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.warm_python import ROOT, WarmPopen, is_ours

STARTED = WarmPopen.__mro__[1]
FORKED = pytest.mark.skipif(
    sys.platform != "linux" or os.environ.get("OMP_NUM_THREADS") != "1", reason="all are started here"
)
MODULE = [sys.executable, "-m", "tests.process_facts_program"]
PROGRAM = [sys.executable, str(ROOT / "tests" / "process_facts_program.py")]
HEAD = """
import os, signal, sys, time
print(os.getpid(), "torch" in sys.modules, flush=True)
"""


def facts(popen: type[subprocess.Popen[str]], command: Sequence[str], folder: Path, **options: Any) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "ONLY": "here"}
    read, write = os.pipe()
    with popen(
        command, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment, pass_fds=[write], **options
    ) as process:
        os.close(write)
        found: dict[str, Any] = json.loads(process.communicate()[0])
    assert process.returncode == 0
    assert os.read(read, 1) == b""  # nobody holds the other end any more, no template either
    os.close(read)
    return found


@FORKED
@pytest.mark.parametrize("command", [[*MODULE, "a", "b c"], [*PROGRAM, "-x"]], ids=["module", "program"])
def test_a_forked_process_is_given_what_a_started_one_is(command: list[str], tmp_path: Path) -> None:
    ours = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        options = {"start_new_session": len(command) == 3, "stderr": subprocess.STDOUT}
        started, forked = (facts(popen, command, tmp_path, **options) for popen in (STARTED, WarmPopen))
    finally:
        signal.signal(signal.SIGTERM, ours)
    assert forked == started
    assert forked["own_worker"]
    assert forked["leads_session"] is options["start_new_session"]
    assert forked["environment"]["ONLY"] == "here"


def program(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A program that may be forked."""
    path = folder / "held.py"
    path.write_text(f"{HEAD}{text}\n", encoding="utf-8")
    monkeypatch.setattr("tests.warm_python.PROGRAMS", [path])
    return str(path)


@FORKED
@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("sys.exit(7)", 7, ""),
        ("sys.exit('no memory')", 1, "no memory\n"),
        ("import atexit; atexit.register(print, 'last', file=sys.stderr)", 0, "last\n"),
        ("raise ValueError('bad')", 1, "ValueError: bad\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", -signal.SIGINT, "KeyboardInterrupt\n"),
    ],
)
def test_it_ends_as_it_would_have(
    text: str, code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    try:
        done = subprocess.run(
            [sys.executable, program(tmp_path, text, monkeypatch)], capture_output=True, text=True, check=False
        )
    finally:
        signal.signal(signal.SIGINT, ours)
    assert done.returncode == code
    assert done.stderr.endswith(said)
    number, warm = done.stdout.split()
    assert (int(number) > 1, warm) == (True, "True")


@FORKED
def test_it_is_waited_for_and_ended_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, program(tmp_path, "time.sleep(60)", monkeypatch)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline().split()[0]) == process.pid
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.terminate()
        assert process.wait() == -signal.SIGTERM


@FORKED
def test_its_template_ends_with_it_however_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = "print(open(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read(), flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, program(tmp_path, children, monkeypatch)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (template,) = map(int, process.stdout.readline().split())
        process.kill()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{template}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_other_commands_are_started(tmp_path: Path) -> None:
    code = "import sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    (tmp_path / "qvgen").mkdir()
    (tmp_path / "qvgen" / "__init__.py").touch()
    for name, value in (("OMP_NUM_THREADS", "2"), ("HF_HUB_CACHE", "/elsewhere"), ("PYTHONPATH", str(tmp_path))):
        assert not is_ours(MODULE, {**os.environ, name: value}, Path("/"))
    assert not is_ours(MODULE, os.environ, tmp_path)  # it would import the qvgen in that folder
    assert not is_ours([sys.executable, "-m", "pytest"], os.environ, ROOT)


@FORKED
def test_commands_of_ours_are_forked() -> None:
    assert is_ours(MODULE, os.environ, ROOT)
    assert is_ours((*PROGRAM, "worker"), os.environ, Path("/"))
