"""Processes that help with a start and die: the run ends and says who, and can be begun again."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed import HashStore

from qvgen.cli import BAD_INPUT, DONE
from qvgen.errors import UnfitEnvironmentError
from qvgen.training.distributed import start_watch
from qvgen.training.distributed.launcher import WorkerGroup
from qvgen.training.distributed.layer_shares import SHARES_DIRECTORY
from qvgen.training.distributed.start_watch import StartWatch, give_sign
from qvgen.training.start_file import START_FILE
from tests.runs import UNSEEN, shallow, train

KEYS = ("steps=2", "phi.ranks=[2]", "devices=2", "strategy=ddp", *UNSEEN, *shallow(1))


def test_a_process_that_dies_in_the_start_is_named_and_the_run_begins_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask_the_dead(group: WorkerGroup) -> None:
        for child in group._children.values():
            child.kill()
            child.wait()

    with monkeypatch.context() as patch:
        patch.setattr(WorkerGroup, "ask", ask_the_dead)
        assert train(tmp_path / "run", *KEYS) == BAD_INPUT
    assert "the process of rank 1 was killed by signal SIGKILL" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / START_FILE).exists()
    assert (tmp_path / "run" / SHARES_DIRECTORY).is_dir()
    assert train(tmp_path / "run", *KEYS, "devices=1", "strategy=single", "resume=true") == DONE
    assert not (tmp_path / "run" / SHARES_DIRECTORY).exists()


def test_a_process_of_another_launcher_that_gives_no_sign_any_more_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(start_watch.time, "monotonic", lambda: now[0])
    store, said = HashStore(), []
    watch = StartWatch(store, ranks=(1, 2), failure=lambda: said[0] if said else None)
    for second in range(0, 200, 10):  # both compute
        now[0] = second
        give_sign(store, rank=1)
        give_sign(store, rank=2)
        watch.check()
    for second in range(200, 250, 10):
        now[0] = second
        give_sign(store, rank=1)
        watch.check()
    now[0] = 260.0
    with pytest.raises(UnfitEnvironmentError, match="rank 2 has given no sign of life for 70 s"):
        watch.check()
    said.append("rank 1 on n1 failed: no such file")
    now[0] = 262.0
    with pytest.raises(UnfitEnvironmentError, match="rank 1 on n1 failed"):
        watch.check()
