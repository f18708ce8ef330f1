"""Processes that share out items: whose item is known, and which of them is said to be silent."""

from __future__ import annotations

import os
import time

import pytest

from qvgen import work_item
from qvgen.training.distributed import heartbeat, item_watch
from qvgen.training.distributed.heartbeat import Pulse
from qvgen.training.distributed.item_watch import ItemWatch


def test_an_item_is_read_in_pieces_and_kept_while_its_process_waits() -> None:
    pulse = Pulse()
    ends = pulse.open(2)
    heartbeat.report_to(ends[1])
    try:
        work_item.begin("video 2\nof 3, été")
        received = os.read(pulse.beats[1].descriptor, 100)
        for byte in received:
            assert not list(pulse.beats[1].take(bytes([byte]), time.monotonic()))
        assert pulse.beats[1].where == "video 2 of 3, été"
        work_item.wait()
        pulse.read()
        assert pulse.beats[1].where == "waiting for the others behind video 2 of 3, été"
        work_item.go_on()
        heartbeat.report(heartbeat.TICK)
        pulse.read()
        assert pulse.beats[1].where == "video 2 of 3, été"
        heartbeat.report(heartbeat.COMPUTING, step=7)
        pulse.read()
        assert pulse.beats[1].where == "computing, step 7"
    finally:
        heartbeat.report_to(None)
        work_item.forget()
        pulse.close()
        for end in ends:
            os.close(end)
    assert not work_item.is_watched()


def watched(monkeypatch: pytest.MonkeyPatch, *, hang_minutes: float | None) -> tuple[Pulse, ItemWatch, list[str]]:
    """Three processes; the first two are busy, the third waits."""
    monkeypatch.setattr(heartbeat, "LOST_SECONDS", 50.0)
    pulse, said = Pulse(), []
    pulse.expect(3)
    for rank, what in enumerate((heartbeat.ITEM, heartbeat.ITEM, heartbeat.WAITING)):
        pulse.beats[rank].what, pulse.beats[rank].is_there, pulse.beats[rank].item = what, True, f"video {rank}"
    watch = ItemWatch(
        pulse,
        hang_minutes=hang_minutes,
        key="hang_minutes",
        name=lambda rank: f"process {rank}",
        end=lambda code, why: said.append(f"{code}: {why}"),
    )
    return pulse, watch, said


def test_one_that_gives_no_sign_is_named_and_who_waits_for_it_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pulse, watch, said = watched(monkeypatch, hang_minutes=1.5)
    watch.look()
    assert not caplog.messages
    pulse.beats[0].at -= 2 * item_watch.ITEM_SECONDS  # it waits in a collective
    pulse.beats[2].ticked_at -= 60.0
    watch.look()
    watch.look()
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("rank 2 (process 2) has not reported since ")
    pulse.beats[2].ticked_at -= 40.0
    watch.look()
    (line,) = said
    assert line.startswith("2: rank 2 (process 2) has not reported since ")
    assert line.endswith("behind video 2: ended after hang_minutes=1.5; ")


def test_one_that_runs_and_says_nothing_of_its_item_is_named_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pulse, watch, said = watched(monkeypatch, hang_minutes=None)
    pulse.beats[1].at -= item_watch.ITEM_SECONDS + 1
    watch.look(with_rank_0=False)
    assert [message.partition(" has")[0] for message in caplog.messages] == ["rank 1 (process 1)"]
    pulse.beats[1].at = time.monotonic()
    watch.look()
    assert caplog.messages[-1].startswith("rank 1 (process 1) reports again, after ")
    assert not said
