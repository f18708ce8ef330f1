"""Numbers of a student's layers over a training: how many components of Phi are small, and how inputs are cut.

    phi/small_share    share of the singular values of L R, over all layers, below a tenth of their layer's largest
    clip/low_tT        mean over layers of the factor on the minimum of inputs, of the noise bands from timestep T to T + 200
    clip/high_tT       the same of the factor on the maximum

The first is the paper's second figure (QVGen, arXiv 2505.11497, Sec. 3.3), with a bound of our own: what training makes of
the components, so without the gate that the schedule closes. Singular values of L R are the roots of the eigenvalues of
(L^T L)(R R^T), an r x r matrix for each layer: no weight is decomposed. A device is waited for twice at such a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.swap import quantized_layers
from qvgen.lowrank.phi import Phi
from qvgen.lowrank.sharded import whole
from qvgen.quant.precision import to_float64
from qvgen.quantizers.activation_dynamic import ActivationDynamic

SMALL = 0.1
"""A singular value below this share of the largest of its layer is small."""

WINDOWS = 5
"""Parts of the noise levels whose clips are logged apart."""

POINTS = 100
"""About how many steps of a run are looked at."""

STUDENT_COLUMNS = (
    "phi/small_share",
    *(f"clip/{side}_t{1000 * window // WINDOWS}" for side in ("low", "high") for window in range(WINDOWS)),
)
"""Names of the numbers, which are columns of metrics.csv."""


def is_looked_at(step: int, *, num_steps: int, points: int = POINTS) -> bool:
    """Whether an optimizer step is one of about so many; the first and the last always are."""
    return step % max(1, num_steps // points) == 0 or step == num_steps - 1


@torch.no_grad()
def student_metrics(student: nn.Module) -> dict[str, float]:
    """The numbers by column, as far as there are any; a collective where the student is sharded."""
    layers = list(quantized_layers(student).values())
    return {**_small_share(layers), **_clips(layers)}


def _small_share(layers: Sequence[FakeQuantLinear]) -> dict[str, float]:
    helpers = [layer.phi for layer in layers if layer.phi is not None and layer.phi.rank]
    if not helpers:
        return {}
    values = torch.tensor(phi_singular_values(helpers), dtype=torch.float64)
    small = values < SMALL * values.amax(-1, keepdim=True)
    return {"phi/small_share": float(small.double().mean())}


@torch.no_grad()
def phi_singular_values(helpers: Sequence[Phi]) -> list[list[float]]:
    """Singular values of L R of each helper, rising, without gates; all have the same rank.

    A collective where they are sharded; a device is waited for once.
    """
    if not helpers:
        return []
    grams = []
    for phi in helpers:  # one by one: a factor in float64 is freed before the next one comes
        columns, rows = to_float64(whole(phi.left)[:, : phi.rank]), to_float64(whole(phi.right)[: phi.rank])
        grams.append(torch.stack([columns.mT @ columns, rows @ rows.mT]))
    left, right = torch.stack(grams, dim=1).cpu()
    found: list[list[float]] = singular_values(left, right).tolist()
    return found


def singular_values(left: Tensor, right: Tensor) -> Tensor:
    """Singular values of products L R from L^T L and R R^T, [..., r, r] each, float64; [..., r], rising.

    Example:
        >>> singular_values(torch.diag(torch.tensor([4.0, 1.0])), torch.eye(2)).tolist()
        [1.0, 2.0]
    """
    values, vectors = torch.linalg.eigh(left)
    half = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    return torch.linalg.eigvalsh(half.mT @ right @ half).clamp(min=0).sqrt()


def _clips(layers: Sequence[FakeQuantLinear]) -> dict[str, float]:
    quantizers = {id(layer.activation_quantizer): layer.activation_quantizer for layer in layers}  # some are shared
    dynamic = [quantizer for quantizer in quantizers.values() if isinstance(quantizer, ActivationDynamic)]
    tables = {side: [getattr(quantizer, f"clip_{side}") for quantizer in dynamic] for side in ("low", "high")}
    logits = {side: [whole(table) for table in of_side if table is not None] for side, of_side in tables.items()}
    logits = {side: of_side for side, of_side in logits.items() if of_side}
    if not logits:
        return {}
    by_band = torch.stack([torch.stack(of_side) for of_side in logits.values()]).cpu().double().sigmoid().mean(1)
    found = {}
    for side, factors in zip(logits, by_band, strict=True):
        ends = [-(-window * len(factors) // WINDOWS) for window in range(WINDOWS + 1)]
        for window, (first, end) in enumerate(pairwise(ends)):
            if first < end:
                found[f"clip/{side}_t{1000 * window // WINDOWS}"] = float(factors[first:end].mean())
    return found
