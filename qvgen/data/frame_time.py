"""When the frames of a clip are shown: evenly, or each at its own time.

    evenly      every frame within a tenth of a frame of the straight line from the first to the last (and a tick of the
                clock, to which containers round, if it is below half a frame): chosen by counting, at the rate that the
                file states where that agrees
    else        chosen by their times, :func:`nearest_frames`

A single frame that is missing bends the line by up to half a frame, and is seen. Times count from the first
frame that is shown: a start offset, negative time stamps and edit lists change nothing.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

EVEN_TOLERANCE = Fraction(1, 10)
"""Share of a frame's duration by which frames of an even clip may be early or late."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """When frames are shown.

    Attributes:
        fps: Frames per second, the average.
        times_s: Seconds from the first frame's, ascending; None where the frames are evenly spaced.
    """

    fps: Fraction
    times_s: tuple[float, ...] | None


def read_timing(times: Sequence[Fraction], *, tick: Fraction, stated: Fraction | None) -> Timing:
    """The timing of frames.

    Args:
        times: Seconds, ascending, one for each frame.
        tick: Seconds of the clock's unit.
        stated: Frames per second that the file states, or None.

    Raises:
        ValueError: All frames have one time, or a single one has no rate; says so as the end of a sentence.
    """
    intervals = len(times) - 1
    if intervals < 1:
        return Timing(fps=stated or Fraction(1), times_s=None)
    span = times[-1] - times[0]
    if span <= 0:
        raise ValueError(f"has the same time stamp on all of its {len(times)} frames; encode it anew with a frame rate")
    spacing = span / intervals
    slack = EVEN_TOLERANCE * spacing + (tick if 2 * tick < spacing else 0)  # a clock of whole frames rounds nothing
    fps = stated if stated and abs(intervals / stated - span) <= slack else 1 / spacing
    if all(abs(time - times[0] - index * spacing) <= slack for index, time in enumerate(times)):
        return Timing(fps=fps, times_s=None)
    return Timing(fps=1 / spacing, times_s=tuple(float(time - times[0]) for time in times))


def nearest_frames(times_s: Sequence[float], *, count: int, step_s: float) -> tuple[int, ...] | None:
    """The frames nearest to ``count`` moments that are ``step_s`` apart, in the middle of a clip.

    Args:
        times_s: Seconds, ascending.
        count: Frames, > 0.
        step_s: Seconds, > 0.

    Returns:
        Strictly ascending indices, or None where the clip is too short.

    Raises:
        ValueError: No frame is within half a step of a moment, or one is nearest to two; says so.
    """
    spare = times_s[-1] - times_s[0] - (count - 1) * step_s
    if spare < 0:
        return None
    chosen: list[int] = []
    for index in range(count):
        moment = times_s[0] + spare / 2 + index * step_s
        after = min(bisect.bisect_left(times_s, moment), len(times_s) - 1)
        before = max(after - 1, 0)
        nearest = before if moment - times_s[before] < times_s[after] - moment else after
        if abs(times_s[nearest] - moment) > step_s / 2 or (chosen and nearest <= chosen[-1]):
            raise ValueError(
                f"no frame of its own at {moment:.3f} s, between the frames at {times_s[before]:.3f} and "
                f"{times_s[after]:.3f} s; the model needs one every {step_s:.4g} s"
            )
        chosen.append(nearest)
    return tuple(chosen)
