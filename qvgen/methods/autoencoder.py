"""Training of a video VAE on pixel clips (Kingma and Welling 1312.6114; latent diffusion 2112.10752): a model's first stage.

    loss = mean |x - decode(z)| + kl_weight * mean KL(q(z | x) || N(0, 1))        z ~ q(z | x), both means over all numbers

Left out: perceptual and adversarial losses, which sharpen what the L1 norm leaves blurred.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from qvgen.config.schema.value_range import Range, check_ranges
from qvgen.methods.base import CaptionDropout, Method, Trains


@dataclass(frozen=True, kw_only=True)
class Autoencoder(Method):
    """No transformer, no captions, nothing quantized.

    Attributes:
        kl_weight: Weight of the KL divergence per latent number in nats. It only keeps latents from growing
            without bound: their scale is divided out afterwards.
    """

    trains: ClassVar[Trains] = "autoencoder"
    kl_weight: Annotated[float, Range(">= 0", write="1e-4")]
    caption_dropout: CaptionDropout = field(default=0.0, init=False)
    share_activations: Literal[False] = field(default=False, init=False)

    def __post_init__(self) -> None:
        check_ranges(self, section="method")
