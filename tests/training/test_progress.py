"""Progress in a log and on a terminal, read as a person reads it: whole lines, the last state, no bar drawn over itself."""

from __future__ import annotations

import io
import re
import sys

import pytest

from qvgen.training import progress
from qvgen.training.progress import progress_bar


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, *, turns: int = 50) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    bar = progress_bar(desc="train", unit="step", total=turns)
    for turn in range(turns):
        bar.set_postfix({"loss": f"{turn}"}, refresh=False)
        bar.update()
    bar.close()
    return stream.getvalue()


def test_a_log_has_lines_of_the_first_and_last_state(monkeypatch: pytest.MonkeyPatch) -> None:
    text = _shown(monkeypatch, io.StringIO())
    assert "\r" not in text
    lines = text.splitlines()
    assert text.endswith("\n")
    assert len(lines) == 2  # all turns take less than the ten seconds between two lines
    assert re.match(r"train: +0%.* 0/50 \[00:00<\?, \?step/s\]$", lines[0])
    assert re.match(r"train: 100%.* 50/50 \[00:0\d<00:00, .*step/s, loss=49\]$", lines[-1])


def test_a_line_every_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE_SECONDS", 0.0)
    monkeypatch.setattr(progress, "MAX_LINE_SECONDS", 0.0)
    lines = _shown(monkeypatch, io.StringIO(), turns=5).splitlines()
    assert [re.search(r" (\d)/5 ", line)[1] for line in lines] == ["0", "1", "2", "3", "4", "5"]
    assert len(set(lines)) == len(lines)


@pytest.mark.parametrize(("elapsed", "seconds"), [(1.0, 10.0), (1000.0, 20.0), (1e6, 600.0)])
def test_the_longer_it_takes_the_rarer_the_lines(
    elapsed: float, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    bar = progress_bar(desc="train", unit="step", total=9)
    bar.start_t -= elapsed
    bar.refresh()
    assert bar.mininterval == pytest.approx(seconds, rel=0.2)
    bar.close()


def test_a_terminal_has_one_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    text = _shown(monkeypatch, _Terminal())
    assert text.count("\n") == 1  # after the last state
    assert text.count("\r") > 1


def test_a_process_of_several_names_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress_bar(desc="train", unit="step", total=2, rank=1).close()
    assert sys.stderr.getvalue().startswith("train, rank 1: ")


def test_nothing_is_shown_of_a_loop_without_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(progress_bar([], desc="sensitivity", unit="measurement")) == []
    assert list(progress_bar(["a"], desc="sensitivity", unit="measurement")) == ["a"]
    assert sys.stderr.getvalue().count("sensitivity") == 2  # the loop of one turn alone
