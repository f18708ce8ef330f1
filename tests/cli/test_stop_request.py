"""Requests to stop, in small programs of their own: what they print, their exit codes, and what their children do."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

HEAD = """
import ctypes, os, signal, sys, threading, time
from qvgen import stop_request
from qvgen.config.command_line import begin_job
stop_request.GRACE_SECONDS = 0.3
begin_job("train", ["bits=3"])

def later(*numbers):
    def send():
        for number in numbers:
            time.sleep(0.1)
            os.kill(os.getpid(), number)
    threading.Thread(target=send, daemon=True).start()

def compiled_code():
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_request.SIGNALS)  # the handler can't run in this thread
    ctypes.CDLL(None).sleep(30)
"""
AGAIN = "start again with: qvgen train bits=3"


def run(program: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", HEAD + program], capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)])
def test_the_first_signal_is_an_exception(number: int, code: int) -> None:
    done = run(f"""
with stop_request.listening():
    later({int(number)})
    try:
        time.sleep(30)
    except stop_request.Stopped:
        sys.exit(stop_request.say_end())
""")
    assert (done.returncode, done.stderr) == (code, f"stopped before it was done; {AGAIN}\n")


def test_compiled_code_that_does_not_listen_is_ended() -> None:
    done = run(f"""
with stop_request.listening():
    stop_request.note("in the middle")
    later({int(signal.SIGTERM)})
    compiled_code()
""")
    assert (done.returncode, done.stderr) == (143, f"\nstopped in the middle; {AGAIN}\n")


def test_what_is_half_written_is_deleted_where_the_process_is_ended(tmp_path: Path) -> None:
    done = run(f"""
from pathlib import Path
from qvgen.run_directory import atomic_write
from qvgen.unfinished import unfinished
folder = Path({str(tmp_path)!r})

def content(temporary):
    temporary.write_text("half of it")
    later({int(signal.SIGTERM)})
    compiled_code()

with stop_request.listening(), unfinished(folder / "download"):
    (folder / "download").mkdir()
    (folder / "download" / "part").touch()
    atomic_write(folder / "file", content)
""")
    assert done.returncode == 143
    assert list(tmp_path.iterdir()) == []


def test_what_belongs_together_is_done_before_a_stop() -> None:
    done = run(f"""
with stop_request.listening():
    try:
        with stop_request.undivided():
            os.kill(os.getpid(), {int(signal.SIGINT)})
            time.sleep(0.5)  # longer than GRACE_SECONDS
            stop_request.note("after both")
            stop_request.continue_with({{}})
            stop_request.not_begun(["qvgen train bits=4"])
        assert False, "it goes on"
    except stop_request.Stopped:
        sys.exit(stop_request.say_end())
""")
    lines = ["stopped after both; continue with: qvgen train bits=3", "not begun: qvgen train bits=4"]
    assert (done.returncode, done.stderr.splitlines()) == (130, lines)


def test_a_second_signal_ends_at_once_and_the_first_ones_code_counts() -> None:
    done = run(f"""
with stop_request.listening():
    stop_request.postpone(True)
    stop_request.note("after step 4, saved")
    stop_request.continue_with({{"run_dir": "a b", "resume": True}})
    later({int(signal.SIGINT)}, {int(signal.SIGTERM)})
    compiled_code()
""")
    line = """stopped after step 4, saved; continue with: qvgen train bits=3 'run_dir='"'"'a b'"'"'' resume=true"""
    assert (done.returncode, done.stderr) == (130, f"\n{line}\n")


def test_what_is_postponed_is_found_by_asking() -> None:
    done = run(f"""
with stop_request.listening():
    stop_request.postpone(True)
    os.kill(os.getpid(), {int(signal.SIGUSR1)})
    time.sleep(0.05)
    assert stop_request.is_requested() and stop_request.is_postponed_request()
    stop_request.postpone(False)
    try:
        stop_request.check()
    except stop_request.Stopped:
        sys.exit(stop_request.say_end())
""")
    assert done.returncode == 143


def test_a_forked_childs_signals_are_its_own() -> None:
    done = run(f"""
with stop_request.listening():
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    os.kill(child, {int(signal.SIGTERM)})
    assert os.waitpid(child, 0)[1] == {int(signal.SIGTERM)}
    time.sleep(0.5)  # longer than GRACE_SECONDS: nothing has reached this process
    assert not stop_request.is_requested()
""")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_signal_while_a_process_is_started_is_not_lost_and_not_the_childs() -> None:
    done = run(f"""
import subprocess
from qvgen.worker_signals import held_back
with stop_request.listening():
    try:
        with held_back():
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"])
            os.kill(child.pid, {int(signal.SIGINT)})
            os.kill(os.getpid(), {int(signal.SIGINT)})
            time.sleep(0.05)
        time.sleep(5)
    except stop_request.Stopped:
        assert child.wait() == 0
        sys.exit(stop_request.say_end())
""")
    assert done.returncode == 130, done.stderr


def test_the_handlers_that_were_there_come_back() -> None:
    program = """
before = [signal.getsignal(number) for number in stop_request.SIGNALS]
for _ in range(3):
    with stop_request.listening():
        assert signal.getsignal(signal.SIGTERM) != before[1]
assert [signal.getsignal(number) for number in stop_request.SIGNALS] == before
assert threading.active_count() == 1
"""
    assert run(program).returncode == 0
