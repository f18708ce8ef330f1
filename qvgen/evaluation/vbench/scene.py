"""Scene: how many frames show the scene that the prompt asks for, by Tag2Text's captions of them.

    16 frames, each the middle of a sixteenth -> a caption each -> the share whose caption has every word of the scene's name

A word counts wherever it stands in the caption, also within another word ("bar" in "barn"), as published.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import ClassVar

from qvgen.evaluation.metrics.base import Pair
from qvgen.evaluation.networks.tag2text.captioner import Captioner, Tag2Text, Tag2TextSizes
from qvgen.evaluation.placement import sampling_device
from qvgen.evaluation.vbench import published_file
from qvgen.evaluation.vbench.dimension import NetworkDimension
from qvgen.evaluation.vbench.frame_preparation import middle_frames, tag2text_images

_FRAMES = 16


class Scene(NetworkDimension):
    """Share of the frames that show the scene.

    Attributes:
        sizes: The sizes of the network that the file has.
    """

    sizes: ClassVar[Tag2TextSizes] = Tag2TextSizes()
    name, sampling, asks_for = "scene", "16, the middle one of each sixteenth", True
    title = "scene"
    source = "VBench, arXiv 2311.17982, scene (vbench/scene.py), Tag2Text with Swin-B"
    high = 1.0
    files = (published_file.TAG2TEXT, published_file.TAG_LIST, published_file.BERT_VOCABULARY)
    blind_to = ("frozen",)

    def measure(self, pair: Pair) -> float:
        """See the module.

        Raises:
            ValueError: The list of prompts names no scene, or a list of words or tags is another one.
        """
        asked = self.asked(pair)
        inner = asked.get(self.name) if isinstance(asked, dict) else None
        scene = inner.get(self.name) if isinstance(inner, dict) else None
        if not isinstance(scene, str) or not scene.strip():
            raise ValueError(
                f"vbench.info: {pair.caption!r} has auxiliary_info.{self.name}={asked}, which names no scene"
            )
        captioner = load_captioner(*(self.path(file) for file in self.files), sizes=self.sizes)
        frames = tag2text_images(middle_frames(pair.video.frames, _FRAMES), side=self.sizes.swin.side)
        return shown(scene, captioner(frames.to(sampling_device())))


def shown(scene: str, captions: Sequence[str]) -> float:
    """Share of the captions that have every word of the scene.

    >>> shown("train station", ["a train at a station", "a train", "a station with trains"])
    0.6666666666666666
    """
    return sum(all(word in caption for word in scene.split()) for caption in captions) / len(captions)


@cache
def load_captioner(weights: Path, tags: Path, words: Path, *, sizes: Tag2TextSizes) -> Captioner:
    """The captioner of three files, read once, on the device that measures; raises ValueError for other files."""
    network = Tag2Text.load(weights, sizes=sizes).to(sampling_device())
    try:
        lists = [path.read_text(encoding="utf-8").splitlines() for path in (words, tags)]
    except (OSError, ValueError) as error:
        raise ValueError(f"{words} or {tags} can't be read as text ({error})") from error
    return Captioner(network, words=lists[0], tags=lists[1])
