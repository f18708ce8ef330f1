"""The processes of a distributed run: checked against real processes that train, die and are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qvgen.training.launcher import (
    RANK_VARIABLES,
    WorkerGroup,
    forget_ranks,
    guard_world_size,
    refuse_foreign_launcher,
    worker_command,
)

LEFTOVER = {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "7", "MASTER_PORT": "1", "MASTER_ADDR": "10.255.255.1"}


def child(program: str) -> list[str]:
    return [sys.executable, "-c", f"import os, signal, sys, time\n{program}"]


def test_two_processes_train_twice_in_one_program_whatever_ranks_the_environment_holds(tmp_path: Path) -> None:
    program = Path(__file__).with_name("ddp_program.py")
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)],
        env=os.environ | LEFTOVER | paths,
        timeout=600,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for job in ("first", "second"):
        for rank in (0, 1):
            # two SGD steps of rate 1 with the mean gradient (1 + 2) / 2
            expected = {"rank": rank, "world_size": 2, "weight": -3.0}
            assert json.loads((tmp_path / f"{job}-rank{rank}.json").read_text()) == expected


def test_children_get_ranks_by_argument_and_none_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in LEFTOVER.items():
        monkeypatch.setenv(name, value)
    program = "print(sorted(os.environ)); print(sys.argv[1:])"
    with WorkerGroup(child(program), world_size=3, log_directory=tmp_path) as group:
        pass
    for rank in (1, 2):
        names, arguments = (tmp_path / f"rank{rank}.log").read_text().splitlines()
        assert not set(RANK_VARIABLES) & set(eval(names))
        expected = ["--rank", rank, "--world-size", 3, "--port", group.port, "--parent", os.getpid()]
        assert eval(arguments) == [str(entry) for entry in expected]


def test_a_child_that_died_is_named_with_its_last_words(tmp_path: Path) -> None:
    killed = child("print('weights are gone', flush=True); os.kill(os.getpid(), signal.SIGKILL)")
    with (
        pytest.raises(RuntimeError, match=r"rank 1 was killed by signal SIGKILL: weights are gone .*rank1\.log"),
        WorkerGroup(killed, world_size=2, log_directory=tmp_path),
    ):
        raise RuntimeError("connection closed by peer")  # what a collective of rank 0 makes of it
    with (
        pytest.raises(RuntimeError, match="rank 1 ended with exit code 3: no output"),
        WorkerGroup(child("sys.exit(3)"), world_size=2, log_directory=tmp_path),
    ):
        pass  # rank 0 was done before


def test_an_error_of_rank_0_passes_and_ends_the_children(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="loss is nan"),
        WorkerGroup(child("time.sleep(100)"), world_size=2, log_directory=tmp_path) as group,
    ):
        raise ValueError("loss is nan")
    assert group._children[1].poll() == -signal.SIGKILL


def test_a_parent_that_hangs_is_ended_when_its_child_dies(tmp_path: Path) -> None:
    parent = child(
        "from pathlib import Path\n"
        "from qvgen.training import launcher\n"
        "launcher.GRACE_SECONDS = 0.2\n"
        "command = [sys.executable, '-c', 'raise SystemExit(\"no memory\")']\n"
        f"with launcher.WorkerGroup(command, world_size=2, log_directory=Path({str(tmp_path)!r})):\n"
        "    time.sleep(100)"
    )
    done = subprocess.run(parent, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"qvgen: the process of rank 1 ended with exit code 1: no memory (see {tmp_path / 'rank1.log'})"
    ]


def test_killing_the_parent_ends_the_child(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    worker = (
        "import os, sys, time; from qvgen.training.launcher import follow_parent; "
        "follow_parent(int(sys.argv[-1])); "
        f"open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(100)"
    )
    parent = child(
        "from pathlib import Path\n"
        "from qvgen.training.launcher import WorkerGroup\n"
        f"command = [sys.executable, '-c', {worker!r}]\n"
        f"with WorkerGroup(command, world_size=2, log_directory=Path({str(tmp_path)!r})):\n"
        "    time.sleep(100)"
    )
    with subprocess.Popen(parent) as process:
        wait_until(lambda: pid_file.exists() and pid_file.read_text() != "")
        process.kill()
    pid = int(pid_file.read_text())
    wait_until(lambda: not is_running(pid))


def wait_until(condition, seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # a zombie waits for its new parent to collect it


def test_foreign_launchers_are_refused_and_their_leftovers_forgotten() -> None:
    with pytest.raises(RuntimeError, match="torchrun.*devices=N strategy=ddp"):
        refuse_foreign_launcher({"TORCHELASTIC_RUN_ID": "7"})
    environment = LEFTOVER | {"HOME": "/home/me"}
    refuse_foreign_launcher(environment)
    forget_ranks(environment)
    assert environment == {"HOME": "/home/me"}


def test_world_size_guard_names_both_numbers() -> None:
    guard_world_size(2, expected=2)
    with pytest.raises(RuntimeError, match="1 processes take part.*devices=2"):
        guard_world_size(1, expected=2)


def test_worker_command_runs_this_package() -> None:
    command = worker_command("train", Path("config.yaml"))
    assert command == [sys.executable, "-m", "qvgen.cli", "worker", "train", "config.yaml"]
