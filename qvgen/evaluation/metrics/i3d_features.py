"""The features that FVD and KVD compare: I3D's logits of a clip, computed once for both."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from qvgen.evaluation.metrics.base import Clip
from qvgen.evaluation.networks import fetched


def features_of(clip: Clip) -> Float[Tensor, " 400"]:
    """I3D's logits of a clip, float64 [400]."""
    path = fetched.I3D.path
    assert path is not None, "absent() is asked first"
    network = fetched.load_i3d(path)
    return clip.once("i3d", lambda: fetched.i3d_logits(network, clip.frames[None])[0])
