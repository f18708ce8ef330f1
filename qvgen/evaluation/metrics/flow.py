"""The optical flow of a clip by RAFT, computed once for all metrics that ask for it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from qvgen.evaluation.metrics.base import Clip
from qvgen.evaluation.networks import fetched


def flow_of(clip: Clip, *, backward: bool = False) -> Float[Tensor, "F-1 2 H W"]:
    """The flow from each frame to the next in pixels, float64; ``backward`` from each next frame to the one before it."""
    path = fetched.RAFT.path
    assert path is not None, "absent() is asked first"
    network = fetched.load_raft(path)
    if not backward:
        return clip.once("flow", lambda: fetched.optical_flow(network, clip.frames[None]))
    return clip.once("backward flow", lambda: fetched.optical_flow(network, clip.frames.flip(0)[None]).flip(0))
