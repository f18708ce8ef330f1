"""Two "hosts" in network namespaces: torchrun trains over a wire that is slow, or cut in the middle of a step."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from qvgen.cli import DONE
from tests.runs import SHORT, UNSEEN, packed_bytes, read_metrics, shallow, train
from tests.training.distributed.launchers import codes, said
from tests.training.distributed.test_launched_runs import own_lines, wait_for_rows
from tests.training.distributed.two_hosts import two_hosts

KEYS = (*SHORT, *UNSEEN, "steps=16", "checkpoint.every_steps=2", "checkpoint.keep=99", "bits=3", *shallow(1))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of devices=2 on one host, started plainly."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    assert train(run_dir, *KEYS, "devices=2", "strategy=ddp") == DONE
    return run_dir


def test_a_cut_wire_is_named_on_both_hosts_and_the_resumed_run_is_the_same(plain: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with two_hosts(tmp_path) as hosts:
        agents = hosts.torchrun(tmp_path, *KEYS, f"run_dir={run_dir}")
        wait_for_rows(run_dir, 4, agents)
        hosts.cut()
        while "can't be reached" not in said(tmp_path) or said(tmp_path).count("qvgen: rank ") < 2:
            assert any(agent.poll() is None for agent in agents), said(tmp_path)
            time.sleep(0.2)
        hosts.mend()
        assert codes(agents) == [1, 1]  # torchrun's own
        first, second = sorted(line for line in own_lines(said(tmp_path)) if line.startswith("qvgen"))
        cut = r"can't be reached: its machine has answered nothing for 60 s \([^)]*\)"
        assert re.match(rf"qvgen: rank 0 on host-a ends in step \d+: rank 1 \(process \d+ on host-b\) {cut}", first)
        assert re.match(rf"qvgen: rank 1 on host-b ends in step \d+: rank 0 \(process \d+ on host-a\) {cut}", second)
        assert not (run_dir / "packed").exists()
        assert codes(hosts.torchrun(tmp_path, *KEYS, f"run_dir={run_dir}", "resume=true")) == [0, 0], said(tmp_path)
    assert packed_bytes(run_dir) == packed_bytes(plain)
    assert read_metrics(run_dir) == read_metrics(plain)


def test_a_slow_wire_and_a_stopped_rank_harm_nothing(plain: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = (*KEYS, f"run_dir={run_dir}", "training.hang_minutes=5")
    with two_hosts(tmp_path, delay_s=0.05) as hosts:
        agents = hosts.torchrun(tmp_path, *words)
        wait_for_rows(run_dir, 4, agents)
        agent = agents[1].pid  # of what `ip netns exec` became
        (worker,) = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
        os.kill(int(worker), signal.SIGSTOP)
        while "has not reported since" not in said(tmp_path):
            assert all(process.poll() is None for process in agents), said(tmp_path)
            time.sleep(0.2)
        os.kill(int(worker), signal.SIGCONT)
        assert codes(agents) == [0, 0], said(tmp_path)
    named = (
        rf"rank 1 \(process {worker} on host-b\) has not reported since [\d:]+, \d+ s ago: .*; a step takes [\d.]+ s"
    )
    assert re.search(named, said(tmp_path)), said(tmp_path)
    assert "all ranks report again" in said(tmp_path)
    assert packed_bytes(run_dir) == packed_bytes(plain)
    assert read_metrics(run_dir) == read_metrics(plain)
