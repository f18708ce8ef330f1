"""Color: whether the object has the color that the prompt asks for, by GRiT's phrases for what it detects.

    of 16 frames:  those with the object and its color / those with the object and any of twelve colors

A frame is one with the object if its surest detection has the object's class; then the phrases of all detections in it are
looked at, and a color counts wherever it stands in one of them, also within another word ("red" in "colored"). Both as
published: the program gives every detection of a frame the class of the first. A video in which the object is seen with no
color has no value. The object's name is the prompt without the color and without "a" and "an", as VBench cuts them out.
"""

from __future__ import annotations

from collections.abc import Sequence

from qvgen.evaluation.metrics.base import Pair
from qvgen.evaluation.vbench.detected_objects import DetectorDimension

_COLORS = (
    "white", "red", "pink", "blue", "silver", "purple", "orange", "green", "gray", "yellow", "black", "grey",
)  # fmt: skip


class Color(DetectorDimension):
    """Share of the frames with the object in which it has the color."""

    name = "color"
    title = "color"
    source = "VBench, arXiv 2311.17982, color (vbench/color.py), GRiT"
    whole_levels = True

    def measure(self, pair: Pair) -> float | None:
        """See the module; raises ValueError where the list of prompts names no color, or a file is another one."""
        asked = self.asked_text(pair, "color")
        assert pair.caption is not None, "the list of prompts has the caption"
        wanted, describer = object_of(pair.caption, color=asked), self.describer()
        found = [
            describer.phrases(features) if describer.classes(features[:1]) == [wanted] else []
            for _, features in self.objects(pair)
        ]
        return colored(found, asked)


def object_of(prompt: str, *, color: str) -> str:
    """The object of a prompt.

    >>> object_of("a red bicycle", color="red"), object_of("an orange umbrella", color="orange")
    ('bicycle', 'umbrella')
    """
    return prompt.replace("a ", "").replace("an ", "").replace(color, "").strip()


def colored(frames: Sequence[Sequence[str]], color: str) -> float | None:
    """Frames with a phrase that has the color, over those with a phrase that has any; None where there are none of these.

    >>> colored([["a red car", "the sky"], ["a blue car"], ["a car"], []], "red")
    0.5
    """
    seen = sum(any(other in phrase for phrase in frame for other in _COLORS) for frame in frames)
    right = sum(any(color in phrase for phrase in frame) for frame in frames)
    return right / seen if seen else None
