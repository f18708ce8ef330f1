"""The kernel video distance: the squared maximum mean discrepancy of I3D's logits of two sets of videos.

    mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j),      k(x, y) = (x . y / D + 1)^3

Unterthiner et al. 2018, arXiv 1812.01717, 3, with the kernel of Binkowski et al. 2018, arXiv 1801.01401, 4. The estimate has
no bias, so that sets which do not differ may give a number a little under 0.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from qvgen.evaluation.metrics.base import Clip, SetMetric
from qvgen.evaluation.metrics.i3d_features import features_of
from qvgen.evaluation.networks import fetched


class KernelVideoDistance(SetMetric):
    """KVD; smaller is closer to the reference's set."""

    title = "KVD"
    source = "arXiv 1812.01717, with the cubic kernel of arXiv 1801.01401 and the logits of I3D on Kinetics-400"
    low = float("-inf")
    better = "lower"
    blind_to = ("frozen", "flicker")
    weights = (fetched.I3D,)

    def features(self, clip: Clip) -> Float[Tensor, " 400"]:
        """I3D's logits."""
        return features_of(clip)

    def distance(self, videos: Float[Tensor, "N D"], reference: Float[Tensor, "M D"]) -> float:
        """See the module."""
        return kernel_distance(videos, reference)


def kernel_distance(a: Float[Tensor, "N D"], b: Float[Tensor, "M D"]) -> float:
    """The distance of two sets of features, float64, two rows or more in each."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.mT / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())
