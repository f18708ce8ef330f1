"""Aesthetic quality: the mean over frames of LAION's aesthetic predictor over 10, linear in CLIP ViT-L/14's unit feature."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from torch import Tensor
from torch.nn import functional

from qvgen.evaluation.metrics.base import Pair
from qvgen.evaluation.networks.published_tensors import read_tensors
from qvgen.evaluation.vbench import published_file
from qvgen.evaluation.vbench.clip_features import clip_features
from qvgen.evaluation.vbench.dimension import NetworkDimension


class AestheticQuality(NetworkDimension):
    """Predicted human rating of the frames, a tenth of it: about 0 to 1, larger is more beautiful."""

    name, sampling = "aesthetic_quality", "all frames, each alone"
    title = "aesthetic quality"
    source = (
        "VBench, arXiv 2311.17982, aesthetic quality (vbench/aesthetic_quality.py), LAION's predictor on CLIP ViT-L/14"
    )
    low = float("-inf")
    files = (published_file.CLIP_L, published_file.AESTHETIC)
    blind_to = ("frozen",)

    def measure(self, pair: Pair) -> float:
        """See the module."""
        features = clip_features(pair.video, self.path(published_file.CLIP_L)).double()
        weight, bias = _load_head(self.path(published_file.AESTHETIC))
        if weight.shape != (1, features.shape[1]):
            raise ValueError(
                f"{published_file.AESTHETIC.name} takes {weight.shape[-1]} values, and CLIP has {features.shape[1]}"
            )
        return float((functional.normalize(features, dim=1) @ weight[0] + bias).mean() / 10)


@cache
def _load_head(path: Path) -> tuple[Tensor, Tensor]:
    """Weight [1, D] and bias [1] of the predictor, float64."""
    tensors = read_tensors(path)
    if set(tensors) != {"weight", "bias"}:
        raise ValueError(f"{path} holds {', '.join(sorted(tensors))}, and not weight and bias of LAION's predictor")
    return tensors["weight"].double(), tensors["bias"].double()
