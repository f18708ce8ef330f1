"""The base of VBench's dimensions: what a dimension says of itself, which videos it looks at, and where its weights lie.

A dimension is a metric as every other one, in a file of its own here and a file conf/metric/NAME.yaml with VBench's own name
of it. Two things are more than another metric has:

- With a list of prompts (``vbench.info=FILE``) it measures the videos of the prompts that the list names for it, and no
  others. Without one it measures all videos, as VBench does of a user's own, and the dimensions that have to know what
  a prompt asks for are skipped.
- Its weights are files that the user has: ``vbench.weights=FOLDER`` for all, or ``+metric.NAME.weights=FOLDER`` or its FILE.
  A file that is not there skips the dimension with the file's name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from qvgen.evaluation.metrics.base import Pair, VideoMetric
from qvgen.evaluation.networks.published_file import PublishedFile, checksum
from qvgen.evaluation.vbench.published_file import KEY


class Dimension(VideoMetric):
    """A dimension without weights.

    Attributes:
        name: VBench's name of it, also in the list of prompts.
        asks_for: Whether it has to know what the prompt asks for (``auxiliary_info`` in the list of prompts).
        sampling: Which frames it looks at, as published, in words.
        files: Files of weights that it needs.
    """

    name: ClassVar[str]
    asks_for: ClassVar[bool] = False
    sampling: ClassVar[str]
    files: ClassVar[tuple[PublishedFile, ...]] = ()
    better = "higher"
    paired = False

    def concerns(self, pair: Pair) -> bool:
        """Whether the list of prompts names this dimension for the video's prompt; without a list: whether it can do so."""
        if not pair.has_prompt_list:
            return not self.asks_for
        facts = pair.prompt
        return (
            facts is not None and self.name in facts.dimensions and (not self.asks_for or self.name in facts.auxiliary)
        )

    def asked(self, pair: Pair) -> Any:
        """The thing that the prompt asks for: this dimension's auxiliary_info, for example ``{"object": "bird and cat"}``."""
        assert pair.prompt is not None, "concerns() was asked first"
        return pair.prompt.auxiliary[self.name]


class NetworkDimension(Dimension):
    """A dimension with weights.

    Args:
        weights: Folder that holds its files by their published names, or the file where it needs one; null: what
            ``vbench.weights`` says.
    """

    def __init__(self, *, weights: str | None) -> None:
        self.weights_folder = weights

    def absent(self) -> str | None:
        """The first file that is not there or is damaged; None: all are there."""
        return next(
            (why for file in self.files if (why := file.absent(self.weights_folder, key=KEY)) is not None), None
        )

    def path(self, file: PublishedFile) -> Path:
        """Where one of its files lies; :meth:`absent` was asked first."""
        found = file.find(self.weights_folder)
        assert found is not None, "absent() was asked first"
        return found

    def key(self) -> str:
        """The class and the checksums of its files, wherever they lie."""
        sums = [checksum(self.path(file)) for file in self.files]
        return json.dumps([f"{type(self).__module__}.{type(self).__qualname__}", sums])

    def weight_facts(self) -> list[dict[str, str]]:
        """The files that were read, with their checksums and where they are published."""
        return [{"file": file.name, "sha256": checksum(self.path(file)), "source": file.source} for file in self.files]
