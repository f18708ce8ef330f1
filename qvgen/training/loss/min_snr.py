"""Min-SNR weights of training losses over noise levels (arXiv 2303.09556, Sec. 3.4), for each kind of prediction.

Noised samples are x = a x_0 + b n with the signal-to-noise ratio SNR = a^2 / b^2. The paper weighs the squared error of the
clean sample x_0 by min(SNR, gamma). A prediction that is off by d implies a clean sample that is off by a multiple of d,
whose square times min(SNR, gamma) is the weight of d^2:

    prediction            implied x_0          its error    weight of d^2
    noise (epsilon) n     (x - b n) / a        b / a d      b^2 / a^2 min(SNR, gamma) = min(1, gamma / SNR)
    v = a n - b x_0       a x - b v            b d          b^2 min(SNR, gamma) = min(a^2, gamma b^2)
    flow u = n - x_0      x - b u              b d          the same, with a = 1 - sigma and b = sigma

v has a^2 + b^2 = 1, so that its weight is the paper's min(SNR, gamma) / (SNR + 1). Written without SNR a velocity's weight is
0 and no 0 / 0 at pure noise (SNR = 0), where its error says nothing of the clean sample.

Left out: a mean of 1 over the noise levels. The weights are below 1, most of all for velocities at either end, and AdamW
takes no notice of a common factor; ``optim.gradient_clip`` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qvgen.errors import UserError
from qvgen.methods.base import Compared


def min_snr_weights(
    signal: Float[Tensor, " B"], noise: Float[Tensor, " B"], *, compares: Compared, limit: float
) -> Float[Tensor, " B"]:
    """Weights of squared errors.

    Args:
        signal: float [B], a of each sample, in [0, 1].
        noise: float [B], b of each, in [0, 1], not both 0.
        compares: ``prediction``, which is a velocity of either kind, or ``noise``.
        limit: gamma.

    Returns:
        float [B] in [0, 1].

    Example:
        >>> a, b = torch.tensor([0.0, 0.6, 1.0]), torch.tensor([1.0, 0.8, 0.0])
        >>> [round(w, 4) for w in min_snr_weights(a, b, compares="prediction", limit=0.25).tolist()]
        [0.0, 0.16, 0.0]
        >>> [round(w, 4) for w in min_snr_weights(a, b, compares="noise", limit=0.25).tolist()]
        [1.0, 0.4444, 0.0]
    """
    capped = limit * noise.square()
    if compares == "noise":
        return (capped / signal.square()).clamp(max=1)
    return torch.minimum(signal.square(), capped)


def weighted_loss(
    loss: Callable[[slice], Tensor], timestep: Float[Tensor, " B"], *, objective: Any, compares: Compared, limit: float
) -> Float[Tensor, ""]:
    """Mean of each sample's loss times its weight.

    Args:
        loss: The loss of the samples in a slice. A method's is the mean over its samples: one by one they are known apart.
        timestep: Of each sample, in [0, 1000].
        objective: The model's.
        compares: What the method compares; predictions of an objective that ``predicts_noise`` are noise.
        limit: gamma.

    Raises:
        UserError: The objective does not say how much signal and noise there is.
    """
    check_weighting(objective)
    if getattr(objective, "predicts_noise", False):
        compares = "noise"
    weights = min_snr_weights(*objective.signal_and_noise(timestep), compares=compares, limit=limit)
    losses = [loss(slice(index, index + 1)) for index in range(len(weights))]
    return (weights * torch.stack(losses)).mean()


def check_weighting(objective: Any) -> None:
    """Raise UserError for an objective that does not say how much signal and noise there is."""
    if not hasattr(objective, "signal_and_noise"):
        raise UserError(
            f"loss.weighting=min_snr: {type(objective).__name__} has no signal_and_noise(timestep); write it "
            "(qvgen.models.objectives), or write loss.weighting=none"
        )
