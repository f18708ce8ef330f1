"""The Frechet video distance: how far the Gaussians of I3D's logits of two sets of videos are apart.

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))                  Unterthiner et al. 2018, arXiv 1812.01717, 3

tr (C_a C_b)^(1/2) is the sum of the singular values of A B^T, where the rows of A and B are the centred features over
sqrt(n - 1): C_a = A^T A, and C_a C_b = A^T (A B^T) B has the eigenvalues of (A B^T)(A B^T)^T. So no root of a matrix is taken
that fewer videos than features make singular. The estimate falls with the number of videos: only tables of one number can be
compared.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from qvgen.evaluation.metrics.base import Clip, SetMetric
from qvgen.evaluation.metrics.i3d_features import features_of
from qvgen.evaluation.networks import fetched


class FrechetVideoDistance(SetMetric):
    """FVD; smaller is closer to the reference's set, 0 for equal sets."""

    title = "FVD"
    source = "arXiv 1812.01717, with the logits of I3D on Kinetics-400"
    better = "lower"
    weights = (fetched.I3D,)

    def features(self, clip: Clip) -> Float[Tensor, " 400"]:
        """I3D's logits."""
        return features_of(clip)

    def distance(self, videos: Float[Tensor, "N D"], reference: Float[Tensor, "M D"]) -> float:
        """See the module."""
        return frechet_distance(videos, reference)


def frechet_distance(a: Float[Tensor, "N D"], b: Float[Tensor, "M D"]) -> float:
    """The distance of two sets of features, float64, two rows or more in each."""
    means = (a.mean(0) - b.mean(0)).square().sum()
    rows = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b)]
    traces = rows[0].square().sum() + rows[1].square().sum()
    root = torch.linalg.svdvals(rows[0] @ rows[1].mT).sum()
    return max(0.0, float(means + traces - 2 * root))
