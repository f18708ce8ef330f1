"""The base of the four dimensions of what GRiT sees in 16 frames, each the middle of a sixteenth.

Frames whose shorter side has more than 768 pixels are shrunk to 720 first, as published.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from jaxtyping import Float
from torch import Tensor

from qvgen.evaluation.metrics.base import Pair
from qvgen.evaluation.networks.grit.detector import Describer, Grit, GritSizes
from qvgen.evaluation.placement import sampling_device
from qvgen.evaluation.vbench import published_file
from qvgen.evaluation.vbench.dimension import NetworkDimension
from qvgen.evaluation.vbench.frame_preparation import detector_pixels, middle_frames

_FRAMES = 16

T = TypeVar("T")
Box = tuple[int, int, int, int]
"""Left, top, right and bottom in whole pixels, rounded down."""


class DetectorDimension(NetworkDimension):
    """A dimension of what GRiT sees.

    Attributes:
        sizes: The sizes of the network that the file has.
        whole_levels: Whether frames that are shrunk are rounded to whole levels.
    """

    sizes: ClassVar[GritSizes] = GritSizes()
    whole_levels: ClassVar[bool] = False
    sampling: ClassVar[str] = "16, the middle one of each sixteenth"
    asks_for = True
    high = 1.0
    files = (published_file.GRIT, published_file.BERT_VOCABULARY)
    blind_to = ("frozen",)

    def describer(self) -> Describer:
        """GRiT on the device that measures; raises ValueError for files that are other ones."""
        return load_describer(*(self.path(file) for file in self.files), sizes=self.sizes)

    def objects(self, pair: Pair) -> Iterator[tuple[list[Box], Float[Tensor, "N L C"]]]:
        """Boxes and features of the objects of each frame, the surest first."""
        pixels = detector_pixels(middle_frames(pair.video.frames, _FRAMES), whole_levels=self.whole_levels)
        network = self.describer().network
        for frame in pixels:
            boxes, features = network.objects(frame.to(sampling_device()))
            yield [(int(a), int(b), int(c), int(d)) for a, b, c, d in boxes.tolist()], features

    def named(self, pair: Pair) -> list[list[tuple[str, Box]]]:
        """The class's name and the box of each object of each frame."""
        describer = self.describer()
        return [list(zip(describer.classes(features), boxes, strict=True)) for boxes, features in self.objects(pair)]

    def asked_text(self, pair: Pair, key: str) -> str:
        """A text of what the prompt asks for.

        Raises:
            ValueError: The list of prompts has none there.
        """
        asked = self.asked(pair)
        return text_of(asked, key, where=f"vbench.info: {pair.caption!r} has auxiliary_info.{self.name}={asked}")


def text_of(asked: Any, key: str, *, where: str) -> str:
    """The text of a key; raises ValueError, which begins with ``where``, if there is none."""
    found = asked.get(key) if isinstance(asked, dict) else None
    if not isinstance(found, str) or not found.strip():
        raise ValueError(f"{where}, which has no text {key}")
    return found


@cache
def load_describer(weights: Path, words: Path, *, sizes: GritSizes) -> Describer:
    """GRiT of two files, read once, on the device that measures; raises ValueError for other files."""
    network = Grit.load(weights, sizes=sizes).to(sampling_device())
    try:
        tokens = words.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{words} can't be read as text ({error})") from error
    return Describer(network, words=tokens)
