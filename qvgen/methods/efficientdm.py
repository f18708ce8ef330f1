"""EfficientDM (arXiv 2310.03270): frozen weights, low-rank factors that are merged before quantization, learned scales.

    W' = W + (s B) (s A)        trained: A, B, scales and zero points of W', ranges of inputs for each noise band
    loss = mean |v_student - v_teacher|^2

Factors are in units of s, the layer's mean weight step (:mod:`qvgen.layers.weight_adapter`): the paper's scale-aware
gradient, and the release's learning rate of s / 2500 for each layer. Gradients and the optimizer's two moments are those of
the small factors, so that the weights need 4 bytes each and not 16.

Left out: the paper trains on the states of the full-precision model's own sampling and needs no data; here the training data
is noised, as for every other method. Its layers at both ends have 8 bits; here ``model.exclude`` leaves layers out.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn

from qvgen.config.schema.sections import OptimConfig
from qvgen.config.schema.value_range import Range, check_ranges
from qvgen.layers.swap import quantized_layers
from qvgen.layers.weight_adapter import WeightAdapter, merge_
from qvgen.methods.base import CaptionDropout, Method
from qvgen.methods.parameter_group import parameter_groups


@dataclass(frozen=True, kw_only=True)
class EfficientDM(Method):
    """Weights, biases and norms stay as they are; the rest of a quantized layer is distilled.

    Attributes:
        rank: Rank r of the factors of each quantized layer.
        factor_rate: Learning rate of the factors, in units of the layer's mean weight step, over ``optim.learning_rate``;
            with the paper's 3e-5 for a full training 13.3 is the release's s / 2500.
        caption_dropout, share_activations: See :class:`qvgen.methods.base.Method`.
    """

    rank: Annotated[int, Range("> 0", write="32")]
    factor_rate: Annotated[float, Range("> 0", write="13.3")]
    caption_dropout: CaptionDropout = 0.05
    share_activations: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, section="method")

    @property
    def needs_teacher(self) -> bool:
        """The target is the teacher's prediction."""
        return True

    def prepare_(self, student: nn.Module) -> None:
        """Give each quantized layer its factors."""
        for layer in quantized_layers(student).values():
            made = WeightAdapter(out_features=layer.out_features, in_features=layer.in_features, rank=self.rank)
            layer.adapter = made.to(layer.weight.device)

    def start_(self, student: nn.Module, *, seed: int) -> None:
        """Draw A and take the mean step of the grids that a PTQ method chose."""
        for name, layer in quantized_layers(student).items():
            if layer.adapter is not None:
                scale, _ = layer.weight_quantizer.qparams()
                layer.adapter.start_(unit=scale.mean(), generator=_layer_generator(name, seed=seed))

    def finish_(self, student: nn.Module) -> None:
        """Merge the factors into the weights."""
        for layer in quantized_layers(student).values():
            merge_(layer)

    def parameter_groups(self, model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
        """Scales, clips and, as the group ``weights``, the factors, which do not decay."""
        adapters = [layer.adapter for layer in quantized_layers(model).values() if layer.adapter is not None]
        factors = [parameter for adapter in adapters for parameter in adapter.parameters()]
        rate = self.factor_rate * optim.learning_rate
        others = [group for group in parameter_groups(model, optim) if group["name"] in ("scales", "clips")]
        return [*others, {"name": "weights", "params": factors, "lr": rate, "weight_decay": 0.0}]


def _layer_generator(name: str, *, seed: int) -> torch.Generator:
    """A generator keyed by the layer's name: excluding one layer does not change what others draw."""
    digest = hashlib.blake2b(f"efficientdm/{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
