"""The processes of a distributed run: checked against real processes that train, die and are killed."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qvgen.cli import BUG, _guarded
from qvgen.stop_request import SIGNALS
from qvgen.training.distributed.child_command import guard_world_size, worker_command
from qvgen.training.distributed.foreign_launcher import RANK_VARIABLES
from qvgen.training.distributed.launcher import WorkerGroup

LEFTOVER = {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "7", "MASTER_PORT": "1", "MASTER_ADDR": "10.255.255.1"}


def child(program: str) -> list[str]:
    return [sys.executable, "-c", f"import os, signal, sys, time\n{program}"]


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
        given = eval(arguments)
        expected = [
            "--rank",
            rank,
            "--world-size",
            3,
            "--port",
            group.port,
            "--beats",
            given[7],
            "--parent",
            os.getpid(),
        ]
        assert given == [str(entry) for entry in expected]
        assert int(given[7]) > 2


def test_a_child_that_died_is_named_with_its_last_words(tmp_path: Path) -> None:
    killed = child("print('weights are gone', flush=True); os.kill(os.getpid(), signal.SIGKILL)")
    with (
        pytest.raises(RuntimeError, match=r"rank 1 on \S+ was killed by signal SIGKILL: weights are gone .*rank1\.log"),
        WorkerGroup(killed, world_size=2, log_directory=tmp_path),
    ):
        raise RuntimeError("connection closed by peer")  # what a collective of rank 0 makes of it
    with (
        pytest.raises(RuntimeError, match=r"rank 1 on \S+ ended with exit code 3: no output"),
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
        "from qvgen.training.distributed import launcher\n"
        "launcher.GRACE_SECONDS = 0.2\n"
        "command = [sys.executable, '-c', 'raise SystemExit(\"no memory\")']\n"
        f"with launcher.WorkerGroup(command, world_size=2, log_directory=Path({str(tmp_path)!r})):\n"
        "    time.sleep(100)"
    )
    done = subprocess.run(parent, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"qvgen: the process of rank 1 on {socket.gethostname()} ended with exit code 1: no memory "
        f"(see {tmp_path / 'rank1.log'})"
    ]


def test_a_parent_that_makes_the_start_is_ended_when_its_child_dies(tmp_path: Path) -> None:
    parent = child(
        "from pathlib import Path\n"
        "from qvgen.training.distributed import launcher\n"
        "launcher.GRACE_SECONDS = 0.2\n"
        "command = [sys.executable, '-c', 'raise SystemExit(\"no such folder\")']\n"
        f"launcher.WorkerGroup(command, world_size=2, log_directory=Path({str(tmp_path)!r})).start()\n"
        "time.sleep(100)"
    )
    done = subprocess.run(parent, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"qvgen: the process of rank 1 on {socket.gethostname()} ended with exit code 1: no such folder ("
    )


def test_killing_the_parent_ends_the_child(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    worker = (
        "import os, sys, time; from qvgen.training.distributed.child import follow_parent; "
        "follow_parent(int(sys.argv[-1])); "
        f"open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(100)"
    )
    parent = child(
        "from pathlib import Path\n"
        "from qvgen.training.distributed.launcher import WorkerGroup\n"
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


def test_world_size_guard_names_both_numbers() -> None:
    guard_world_size(2, expected=2)
    with pytest.raises(RuntimeError, match="1 processes take part.*devices=2"):
        guard_world_size(1, expected=2)


def test_worker_command_runs_this_package() -> None:
    command = worker_command("train", Path("config.yaml"), {})
    assert command == [sys.executable, "-m", "qvgen.cli", "worker", "train", "config.yaml"]


PARENT = """
import ctypes
from pathlib import Path
from qvgen import stop_request
from qvgen.training.distributed import heartbeat
from qvgen.training.distributed import launcher, silence
silence.SILENT_STEPS, silence.SILENT_SECONDS = 0, 0.5  # whatever a step takes on a busy machine

def wait_for_stop(process):
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.02)

def steps(count):
    for step in range(count):
        heartbeat.report(heartbeat.COMPUTING, step=step)
        heartbeat.report(heartbeat.DONE)
    heartbeat.report(heartbeat.COMPUTING, step=count)

def wait_like_a_collective():
    \"""In compiled code that no signal leaves.\"""
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_request.SIGNALS)
    ctypes.CDLL(None).sleep(100)
"""
HANGING = (
    "import os, sys, signal; from qvgen.training.distributed import heartbeat; "
    "from qvgen.training.distributed.child import follow_parent; "
    "follow_parent(int(sys.argv[-1]), beats=int(sys.argv[-3])); heartbeat.report(heartbeat.COMPUTING, step=3); "
    "os.kill(os.getpid(), signal.SIGSTOP)"
)


def hang(tmp_path: Path, *, hang_minutes: float | None, then: str) -> subprocess.CompletedProcess[str]:
    """A parent whose steps end because rank 1 is stopped; ``then`` runs in a thread beside it.

    Rank 1 has stopped before the parent's first step, so that the silence begins when all is in its place: how long Python
    takes to start on a busy machine changes nothing.
    """
    program = child(
        f"{PARENT}\n"
        "import threading\n"
        "stop_request.note('after step 2, saved')\n"
        "with stop_request.listening():\n"
        "    stop_request.note('after step 2, saved')\n"
        "    stop_request.postpone(True)\n"
        f"    command = [sys.executable, '-c', {HANGING!r}]\n"
        f"    group = launcher.WorkerGroup(command, world_size=2, log_directory=Path({str(tmp_path)!r}),\n"
        f"                                 hang_minutes={hang_minutes})\n"
        "    with group:\n"
        "        wait_for_stop(group._children[1])\n"
        "        steps(4)\n"
        f"        threading.Thread(target=lambda: ({then}), daemon=True).start()\n"
        "        wait_like_a_collective()\n"
    )
    return subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)


STOPPED = "stopped after step 2, saved; start again with: qvgen"


def test_a_rank_that_hangs_is_named_and_ends_the_run(tmp_path: Path) -> None:
    done = hang(tmp_path, hang_minutes=0.02, then="None")
    assert done.returncode == 2, done.stderr
    *warnings, line = [line for line in done.stderr.splitlines() if line]
    who = r"rank 1 \(process \d+ on \S+, stopped by a signal\)"
    since = rf"{who} has not reported since \d\d:\d\d:\d\d, \d+ s ago: computing, step 3"
    assert re.fullmatch(rf"{since}: ended after training\.hang_minutes=0\.02; {STOPPED}.*", line), line
    assert re.search(r"has not reported since .*; a step takes \d+\.\d s", warnings[0])


def test_a_request_to_stop_is_acted_on_while_a_collective_waits(tmp_path: Path) -> None:
    done = hang(tmp_path, hang_minutes=None, then="os.kill(os.getpid(), signal.SIGTERM)")
    assert done.returncode == 143, done.stderr
    assert STOPPED in done.stderr.splitlines()[-1]
    assert "has not reported since" in done.stderr.splitlines()[-1]


def test_a_second_signal_ends_at_once_while_a_collective_waits(tmp_path: Path) -> None:
    twice = "os.kill(os.getpid(), signal.SIGINT), time.sleep(0.05), os.kill(os.getpid(), signal.SIGINT)"
    done = hang(tmp_path, hang_minutes=None, then=twice)
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1].startswith(STOPPED)


def test_a_child_leaves_requests_to_stop_to_its_parent(tmp_path: Path) -> None:
    program = (
        "import os, sys, signal, time; from qvgen.training.distributed.child import follow_parent; "
        "print('started', flush=True); follow_parent(int(sys.argv[-1])); print('follows', flush=True); "
        "time.sleep(0.2); print('lives', flush=True)"
    )
    with WorkerGroup([sys.executable, "-c", program], world_size=2, log_directory=tmp_path) as group:
        for word in ("started", "follows"):
            wait_until(lambda word=word: word in (tmp_path / "rank1.log").read_text())
            for number in SIGNALS:
                os.kill(group._children[1].pid, number)
        group.join()
    assert (tmp_path / "rank1.log").read_text().split() == ["started", "follows", "lives"]


WAITING = (
    "print('imported', flush=True); from qvgen.training.distributed.child import wait_for_group, wait_for_settings; "
    "wait_for_settings(); "
    "wait_for_group(help_start=lambda: print('helps', flush=True), help_calibration=lambda: print('samples', flush=True)); "
    "print('begins', flush=True)"
)


def test_children_that_were_started_early_begin_when_the_group_is_entered(tmp_path: Path) -> None:
    group = WorkerGroup(child(WAITING), world_size=3, log_directory=tmp_path)
    group.start()
    logs = [tmp_path / f"rank{rank}.log" for rank in (1, 2)]
    for log in logs:
        wait_until(lambda log=log: "imported" in log.read_text())
    assert [process.poll() for process in group._children.values()] == [None, None]
    group.ask_calibration()
    group.ask()
    with group:
        group.join()
    assert [log.read_text().split() for log in logs] == [["imported", "samples", "helps", "begins"]] * 2


def test_children_that_were_started_ahead_wait_without_a_folder_and_log_into_it_later(tmp_path: Path) -> None:
    group = WorkerGroup(child(WAITING), world_size=2, log_directory=tmp_path / "run" / "logs")
    if not group.start_ahead():
        pytest.skip("the disk has no files without names")
    assert list(tmp_path.iterdir()) == []
    assert group._children[1].poll() is None
    log = tmp_path / "run" / "logs" / "rank1.log"
    log.parent.mkdir(parents=True)
    log.write_text("of an earlier session")
    with group:
        group.join()
    assert log.read_text().split() == ["imported", "begins"]
    assert [path.name for path in log.parent.iterdir()] == ["rank1.log"]


def test_children_that_never_begin_are_ended(tmp_path: Path) -> None:
    group = WorkerGroup(child(WAITING), world_size=2, log_directory=tmp_path)
    group.start()
    process = group._children[1]
    wait_until(lambda: "imported" in (tmp_path / "rank1.log").read_text())
    group.end()
    assert process.poll() == -signal.SIGKILL
    alone = subprocess.run(child(WAITING), stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert (alone.returncode, alone.stdout.split()) == (1, [b"imported"])


def test_a_child_that_died_before_the_group_was_entered_is_named(tmp_path: Path) -> None:
    group = WorkerGroup(child("sys.exit('no module named x')"), world_size=2, log_directory=tmp_path)
    group.start()
    group._children[1].wait()
    with pytest.raises(RuntimeError, match=r"rank 1 on \S+ ended with exit code 1: no module named x"), group:
        pass


def test_the_last_line_of_a_worker_is_its_whole_error(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise TypeError("device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA to know more")  # as torch has it

    assert _guarded(fail, name="worker", show_traceback=True) == BUG
    line = "qvgen worker: TypeError: device-side assert triggered Compile with TORCH_USE_CUDA_DSA to know more"
    assert capsys.readouterr().err.splitlines()[-1] == line
