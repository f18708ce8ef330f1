"""VQA-A and VQA-T: DOVER's aesthetic and its technical score of a video, without a reference.

    sigmoid((raw - mean) / std)       raw: a branch's mean over places and clips (:mod:`qvgen.evaluation.networks.dover`)

                 mean        std
    aesthetic    -0.08285    0.03774        composition, light, what is shown
    technical     0.1107     0.07355        noise, blur, artefacts

The constants are those of the release (VQAssessment/DOVER, evaluate_a_set_of_videos.py), of which earlier versions have the
two branches' exchanged, and another sign. Tables with values up to 100 have a hundred times ours.
"""

from __future__ import annotations

import json
import math
from typing import ClassVar, Literal

from qvgen.evaluation.metrics.base import Pair, VideoMetric
from qvgen.evaluation.networks.dover.network import DoverSizes, load_dover, view_of
from qvgen.evaluation.networks.published_file import PublishedFile, checksum
from qvgen.evaluation.placement import sampling_device

NORMALIZED = {"aesthetic": (-0.08285, 0.03774), "technical": (0.1107, 0.07355)}
"""Branch -> mean, standard deviation."""

FILE = PublishedFile(
    name="DOVER.pth", folder="pretrained_weights",
    source="https://github.com/VQAssessment/DOVER/releases/download/v0.1.0/DOVER.pth",
    licence=None, megabytes=None, sha256=None,
)  # fmt: skip


class Dover(VideoMetric):
    """One of DOVER's two scores, in (0, 1); larger is better.

    Args:
        branch: Which score: aesthetic or technical.
        weights: DOVER.pth, a .safetensors of the same tensors under the same names, or the folder of either; null: there is
            none, and the metric is skipped.

    Attributes:
        sizes: The sizes of the network that the file has.
    """

    sizes: ClassVar[DoverSizes] = DoverSizes()
    source = "DOVER, arXiv 2211.04894; constants of VQAssessment/DOVER"
    high = 1.0
    better, paired = "higher", False
    slow_on_cpu = True

    def __init__(self, *, branch: Literal["aesthetic", "technical"], weights: str | None) -> None:
        if branch not in NORMALIZED:
            raise ValueError(f"branch={branch} is none of DOVER's; write aesthetic or technical")
        self.branch, self.weights_path = branch, weights
        self.title = {"aesthetic": "VQA-A (DOVER)", "technical": "VQA-T (DOVER)"}[branch]

    def absent(self) -> str | None:
        """Why the file can't be read; None: it is there."""
        name = {"aesthetic": "vqa_a", "technical": "vqa_t"}[self.branch]
        return FILE.absent(self.weights_path, key=f"+metric.{name}.weights")

    def key(self) -> str:
        """The class, the branch, and the checksum of the file, wherever it lies."""
        return json.dumps([f"{type(self).__module__}.{type(self).__qualname__}", self.branch, self._checksum()])

    def weight_facts(self) -> list[dict[str, str]]:
        """The file that was read, with its checksum and where it is published."""
        return [{"file": FILE.name, "sha256": self._checksum(), "source": FILE.source}]

    def _checksum(self) -> str:
        path = FILE.find(self.weights_path)
        assert path is not None, "absent() was asked first"
        return checksum(path)

    def measure(self, pair: Pair) -> float:
        """See the module."""
        path = FILE.find(self.weights_path)
        assert path is not None, "absent() was asked first"
        network = load_dover(path, sizes=self.sizes)
        raw = network.score(
            view_of(pair.video.frames, self.branch, sizes=self.sizes).to(sampling_device()), self.branch
        )
        mean, std = NORMALIZED[self.branch]
        return 1 / (1 + math.exp(-(raw - mean) / std))
