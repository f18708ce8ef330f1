"""Processes that help with a start and die: the run ends and says who, and can be begun again."""

from __future__ import annotations

from pathlib import Path
from socket import gethostname

import pytest

from qvgen.cli import BAD_INPUT, DONE
from qvgen.errors import UnfitEnvironmentError
from qvgen.training.distributed import launcher, start_watch
from qvgen.training.distributed.launcher import WorkerGroup
from qvgen.training.distributed.layer_shares import SHARES_DIRECTORY
from qvgen.training.distributed.start_watch import StartWatch
from qvgen.training.start.file import START_FILE
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
        patch.setattr(
            launcher, "SHARING_GRACE_SECONDS", 600.0
        )  # rank 0 is this very process: it is to see it by itself
        assert train(tmp_path / "run", *KEYS) == BAD_INPUT
    assert (
        f"the process of rank 1 on {gethostname()} was killed by signal SIGKILL"
        in capsys.readouterr().err.splitlines()[-1]
    )
    assert not (tmp_path / "run" / START_FILE).exists()
    assert (tmp_path / "run" / SHARES_DIRECTORY).is_dir()
    assert train(tmp_path / "run", *KEYS, "devices=1", "strategy=single", "resume=true") == DONE
    assert not (tmp_path / "run" / SHARES_DIRECTORY).exists()


class Signs:
    """Rank 0's connections to two others."""

    lost: str | None = None

    def __init__(self) -> None:
        self.at = {1: 0.0, 2: 0.0}

    def signs(self) -> dict[int, float]:
        return self.at


def test_a_process_of_another_launcher_that_gives_no_sign_any_more_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(start_watch.time, "monotonic", lambda: now[0])
    links, said = Signs(), []
    watch = StartWatch(links, failure=lambda: said[0] if said else None)  # type: ignore[arg-type]
    now[0] = 159.0
    watch.check()  # what lies before the start does not count
    links.at = {1: 200.0, 2: 150.0}
    now[0] = 205.0
    watch.check()
    now[0] = 220.0
    with pytest.raises(UnfitEnvironmentError, match="rank 2 has given no sign of life for 70 s"):
        watch.check()
    said.append("rank 1 on n1 failed: no such file")
    with pytest.raises(UnfitEnvironmentError, match="rank 1 on n1 failed"):
        watch.check()
    links.lost = "rank 2 (process 7 on n2) is gone"
    with pytest.raises(UnfitEnvironmentError, match=r"rank 2 \(process 7 on n2\) is gone"):
        watch.check()
