"""Connections between rank 0 and another process: gone, stopped and said goodbye to are told apart, by real processes."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from qvgen.training.distributed import heartbeat, peer_links, silence
from qvgen.training.distributed.peer_links import LinksToOthers

RANK_ONE = """
import logging, os, sys
logging.basicConfig(level=logging.WARNING, format="%(message)s")
from qvgen.training.distributed import heartbeat, peer_links
peer_links.POLL_SECONDS, peer_links.GRACE_SECONDS, peer_links.SILENT_SECONDS = 0.02, 0.0, 0.5
heartbeat.TICK_SECONDS = 0.05
def end(why):
    print(why, flush=True)
    os._exit(2)
def hung(code, why):
    end(f"{code}: {why}")
link = peer_links.LinkToRankZero(1, address="localhost", ask=lambda: sys.argv[1], end=end)
link.start()
link.watch_silence(hang_minutes=float(sys.argv[2]), end=hung)
while not link._pulse.beats:
    pass
heartbeat.report(heartbeat.COMPUTING, step=3)
print("begun", flush=True)
sys.stdin.readline()
link.close()
"""


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[LinksToOthers, list[str]]]:
    """Rank 0's side of two processes, and why it was told to end."""
    monkeypatch.setattr(peer_links, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(peer_links, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(heartbeat, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(heartbeat, "LOST_SECONDS", 0.3)
    ends: list[str] = []
    made = LinksToOthers(2, end=ends.append)
    made.start()
    yield made, ends
    made.close()


@contextmanager
def rank_one(told: str, *, hang_minutes: float = 60.0) -> Iterator[subprocess.Popen[str]]:
    """Rank 1, connected."""
    command = [sys.executable, "-c", RANK_ONE, told, str(hang_minutes)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as made:
        try:
            assert made.stdout is not None
            assert made.stdout.readline() == "begun\n"
            yield made
        finally:
            made.kill()  # whatever it does


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_a_process_that_says_goodbye_is_not_missed(links: tuple[LinksToOthers, list[str]]) -> None:
    zero, ends = links
    beat = zero._pulse.beats[1]
    with rank_one(zero.told) as process:
        wait_until(lambda: beat.what == heartbeat.COMPUTING)
        assert process.communicate("\n") == ("", "")
    wait_until(lambda: beat.end is not None)
    assert (beat.what, zero.lost, ends) == (heartbeat.LEFT, None, [])


def test_a_process_that_is_killed_is_named(links: tuple[LinksToOthers, list[str]]) -> None:
    zero, ends = links
    with rank_one(zero.told) as process:
        wait_until(lambda: zero._pulse.beats[1].step == 3)
        process.kill()
        wait_until(lambda: ends)
    host = socket.gethostname()
    assert zero.lost == f"rank 1 (process {process.pid} on {host}) is gone; last seen computing, step 3"
    assert ends[0] == zero.lost


def test_a_stopped_process_is_named_and_goes_on(
    links: tuple[LinksToOthers, list[str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(silence, "SILENT_STEPS", 0)
    monkeypatch.setattr(silence, "SILENT_SECONDS", 1.0)
    zero, ends = links
    with rank_one(zero.told) as process:
        zero.watch_silence(hang_minutes=60.0, end=lambda code, why: ends.append(why))
        for step in range(4):
            heartbeat.report(heartbeat.COMPUTING, step=step)
            heartbeat.report(heartbeat.DONE)
        os.kill(process.pid, signal.SIGSTOP)
        with caplog.at_level(logging.WARNING):
            wait_until(lambda: "has not reported since" in caplog.text)
            os.kill(process.pid, signal.SIGCONT)
            heartbeat.report(heartbeat.COMPUTING, step=4)
            wait_until(lambda: "all ranks report again" in caplog.text)
    assert f"rank 1 (process {process.pid} on {socket.gethostname()}, stopped by a signal) has not" in caplog.text
    assert ends == []


def test_a_rank_0_that_is_stopped_is_named_by_the_others_and_ends_them_after_hang_minutes(tmp_path: Path) -> None:
    program = (
        "import sys; from qvgen.training.distributed.peer_links import LinksToOthers; "
        "links = LinksToOthers(2, end=print); links.start(); print(links.told, flush=True); sys.stdin.readline()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as zero:
        try:
            assert zero.stdout is not None
            with rank_one(zero.stdout.readline(), hang_minutes=0.03) as process:
                os.kill(zero.pid, signal.SIGSTOP)
                assert process.wait() == 2
                said, warned = process.communicate()
        finally:
            zero.kill()
    name = f"rank 0 (process {zero.pid} on {socket.gethostname()}) gives no sign of life for"
    assert warned.startswith(name)
    assert said.startswith(f"2: {name}")
    assert "its machine answers: ended after training.hang_minutes=0.03; " in said


def test_a_stranger_takes_nobodys_place(links: tuple[LinksToOthers, list[str]]) -> None:
    zero, ends = links
    port = zero._listener.getsockname()[1]
    for words in (
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"token": "x", "rank": 1, "host": "h", "pid": 1}\n',
        b"\xff\n",
        b"[1]\n",
    ):
        with socket.create_connection(("localhost", port)) as connection:
            connection.sendall(words)
            with suppress(ConnectionResetError):
                assert connection.recv(1) == b""
    with socket.create_connection(("localhost", port)) as silent, rank_one(zero.told) as process:
        silent.sendall(b'{"token"')  # one that says nothing whole keeps nobody waiting
        wait_until(lambda: zero._pulse.beats[1].step == 3)
        assert process.communicate("\n") == ("", "")
    assert (zero.lost, ends) == (None, [])


def test_a_process_that_never_comes_is_named(
    links: tuple[LinksToOthers, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_links, "CONNECT_SECONDS", 0.0)
    wait_until(lambda: bool(links[1]))
    assert links[1][0] == "rank 1 did not come within 0 s; see the output of that process"
