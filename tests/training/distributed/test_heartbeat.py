"""Signs of life through real pipes: whom a reader blames, and what it takes for a step."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from qvgen.training.distributed import heartbeat
from qvgen.training.distributed.heartbeat import (
    BACKWARD,
    COMPUTING,
    DELIVERING,
    DONE,
    LEFT,
    MEASURING,
    SAVING,
    WAITING,
    Pulse,
)


@pytest.fixture
def pulse() -> Iterator[tuple[Pulse, list[int]]]:
    made = Pulse()
    ends = made.open(3)
    yield made, ends
    heartbeat.report_to(None)
    made.close()
    for end in ends:
        os.close(end)


def say(end: int, what: int, step: int | None = None) -> None:
    """As the process that has this end."""
    heartbeat.report_to(end)
    heartbeat.report(what, step=step)


def test_the_rank_that_came_least_far_is_named(pulse: tuple[Pulse, list[int]]) -> None:
    read, ends = pulse
    for end in ends:
        say(end, BACKWARD, 7)
    say(ends[1], COMPUTING, 7)
    read.read()
    assert read.who() == [1]
    say(ends[1], BACKWARD, 7)
    read.read()
    assert read.who() == [0, 1, 2]
    say(ends[2], COMPUTING, 8)
    read.read()
    assert read.who() == [0, 1]
    assert "rank 0 (process 11) has not reported since" in read.describe(["process 11", "process 12", "process 13"])


def test_a_process_without_a_tick_is_to_blame(pulse: tuple[Pulse, list[int]]) -> None:
    read, ends = pulse
    for end in ends:
        say(end, BACKWARD, 7)
    read.read()
    for beat in read.beats:
        beat.ticked_at -= 2 * heartbeat.LOST_SECONDS
    say(ends[1], heartbeat.TICK)
    read.read()
    assert read.who() == [2]
    assert (read.beats[1].what, read.beats[1].step) == (BACKWARD, 7)  # a tick is no progress


def test_rank_0_waits_at_the_end_for_who_still_samples(pulse: tuple[Pulse, list[int]]) -> None:
    """What rank 0 does by itself behind training has no limit; what it waits for has one."""
    read, ends = pulse
    for end in ends:
        say(end, MEASURING, 7)
    say(ends[0], DELIVERING)
    say(ends[2], LEFT)
    read.read()
    assert read.is_at_the_end()
    for beat in read.beats:
        beat.ticked_at -= 2 * heartbeat.LOST_SECONDS
    say(ends[1], heartbeat.TICK)
    say(ends[0], WAITING, 7)
    read.read()
    assert not read.is_at_the_end()
    assert read.is_slow()
    assert read.who() == [1]
    before = read.beats[0].at
    heartbeat.report_change(WAITING)  # who waits does not report for those that it waits for
    read.read()
    assert read.beats[0].at == before


def test_rank_0_is_left_alone_while_another_one_samples(pulse: tuple[Pulse, list[int]]) -> None:
    read, ends = pulse
    say(ends[1], MEASURING, 4)
    read.read()
    say(ends[0], COMPUTING, 4)
    read.read()
    assert not read.is_left_alone()  # it may be a moment behind: nothing came from it since
    say(ends[1], MEASURING, 4)
    read.read()
    assert read.is_left_alone()
    say(ends[1], COMPUTING, 4)
    read.read()
    assert not read.is_left_alone()


def test_a_step_is_measured_from_end_to_end_without_what_lies_between(pulse: tuple[Pulse, list[int]]) -> None:
    read, ends = pulse
    assert read.median_seconds() is None
    for what in (DONE, SAVING, DONE, MEASURING, DONE):
        say(ends[0], what, 1)
        read.read()
    assert read.median_seconds() is None
    time.sleep(0.02)
    say(ends[0], DONE)
    read.read()
    median = read.median_seconds()
    assert median is not None
    assert median >= 0.02


def test_nobody_waits_for_a_reader_that_does_not_read(pulse: tuple[Pulse, list[int]]) -> None:
    read, ends = pulse
    heartbeat.report_to(ends[1])
    for step in range(20_000):  # more than a pipe holds
        heartbeat.report(COMPUTING, step=step)
    read.read()
    assert read.beats[1].what == COMPUTING


def test_time_in_which_the_reader_was_stopped_does_not_count(pulse: tuple[Pulse, list[int]]) -> None:
    read, ends = pulse
    say(ends[0], COMPUTING, 1)
    read.read()
    assert read._read_at is not None
    read._read_at -= 3600  # an hour ago, as after Ctrl-Z and fg
    for beat in read.beats:
        beat.at, beat.ticked_at = beat.at - 3600, beat.ticked_at - 3600
    assert read.silent_seconds() > 3599
    read.read()
    assert read.silent_seconds() < 60
    assert read.who() == [1, 2]  # by how far they came: nobody is lost
