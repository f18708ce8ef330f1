"""Subject consistency: whether what is shown stays the same, by the features that DINO ViT-B/16 has of each frame.

See :mod:`qvgen.evaluation.vbench.consistency` for the formula. Frames are resized to a shorter side of 224 pixels, not cut.
"""

from __future__ import annotations

import torch

from qvgen.evaluation.metrics.base import Pair, check_frames
from qvgen.evaluation.networks.dino import load_dino
from qvgen.evaluation.placement import sampling_device
from qvgen.evaluation.vbench import published_file
from qvgen.evaluation.vbench.consistency import consistency
from qvgen.evaluation.vbench.dimension import NetworkDimension
from qvgen.evaluation.vbench.frame_preparation import dino_tensors


class SubjectConsistency(NetworkDimension):
    """Cosines of the frames' features; 1 where all frames are alike."""

    name, sampling = "subject_consistency", "all frames, each beside the one before and the first"
    title = "subject consistency"
    source = "VBench, arXiv 2311.17982, subject consistency (vbench/subject_consistency.py), DINO ViT-B/16"
    high = 1.0
    files = (published_file.DINO,)
    blind_to = ("frozen",)

    def measure(self, pair: Pair) -> float:
        """See the module."""
        check_frames(pair.video, metric=self.title)
        network, device = load_dino(self.path(published_file.DINO)), sampling_device()
        parts = [network(dino_tensors(frame[None]).to(device)).cpu() for frame in pair.video.frames]
        return consistency(torch.cat(parts))
