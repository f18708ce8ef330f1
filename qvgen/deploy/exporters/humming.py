"""humming (humming-kernels 0.1.20), the W4A8 and W3A8 kernels of vLLM and SGLang: a folder of a diffusers transformer.

    NAME.weight         int32 [N, K b / 32]   codes q + 2^(b-1) without gaps, the first column in the lowest bits of a word
    NAME.weight_scale   [N, 1]                bfloat16 or float16, as all that is not packed
    NAME.bias           [N]
    config.json         the transformer's own, with "quantization_config": {"quant_method": "humming", "b_dtype": "uint4",
                        "a_dtype": "int8", ...}, which the two schemas of humming read; other widths of single layers, and
                        layers with a name within another one's, stand under "dynamic" as regular expressions

    s_x = max(max|x| / 127, 1e-30),   q_x = rne(x (1 / s_x)),   y = float32(sum q_x q_w) s_x s_w + bias

Codes of 2 to 8 bits keep their width; K is a multiple of 32. The runtime rearranges words for its tensor cores when it loads
them. Left out: zero points and groups of weights, and inputs of 4 bits, which humming has on other GPUs than Hopper.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qvgen.deploy.exporters.base import DTYPES, ExportedModel, ExportFile, Fit, add_bias, bias_tensor
from qvgen.deploy.exporters.bit_layout import dense_layout, pack_bits, unpack_bits
from qvgen.deploy.exporters.diffusers_folder import diffusers_folder
from qvgen.deploy.exporters.row_scheme import RowScheme, RowWeight
from qvgen.deploy.exporters.svdq_layer import check_half_dtype
from qvgen.errors import UserError
from qvgen.layers.packed_linear import PackedLinear

ACTIVATION_BITS = 8
WORD = 32
"""Bits of a word, and the multiple of columns that ends with one for every width of codes."""


@dataclass(frozen=True, kw_only=True)
class Humming:
    """The target; it implements :class:`qvgen.deploy.exporters.base.Exporter`.

    Attributes:
        dtype: Precision of scales, biases and of all other weights: bfloat16 or float16, the one that the model runs in. The
            kernels hold sums times the scale of inputs in it, so in float16 large ones overflow.
    """

    dtype: str

    runtime: ClassVar[str] = "vLLM and SGLang (humming)"
    profiles: ClassVar[tuple[str, ...]] = ("w4a8_row",)
    needs_original_names: ClassVar[bool] = False
    bound: ClassVar[str] = (
        "The kernels round the sum times the scale of the inputs to the model's half precision, and multiply by the row's "
        "scale and add the bias in it: two roundings of an output where qvgen has one."
    )

    def __post_init__(self) -> None:
        check_half_dtype(self.dtype)

    @property
    def scheme(self) -> RowScheme:
        """The layers that it carries; scales are in the model's precision."""
        dtype: Any = self.dtype
        return RowScheme(
            weight_bits=8,
            activation_bits=(ACTIVATION_BITS,),
            rotations=(0,),
            arithmetic="reciprocal",
            scale_dtype=dtype,
            own_width=True,
        )

    def fit(self, layer: PackedLinear) -> Fit:
        """Whether the layer's codes and inputs are the kernels'."""
        if layer.in_features % WORD:
            raise UserError(f"in_features={layer.in_features} is no multiple of {WORD}, as packed words need")
        return self.scheme.fit(layer)

    def tensors(self, layer: PackedLinear) -> dict[str, Tensor]:
        """The layer's tensors."""
        weight, bits = self.scheme.weight(layer), layer.profile.weight.bits
        codes = (weight.codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
        packed = pack_bits(codes, dense_layout(bits)).reshape(layer.out_features, -1)
        return {
            "weight": packed.view(torch.int32),
            "weight_scale": weight.scale.unsqueeze(-1).to(DTYPES[self.dtype]),
            **bias_tensor(layer, self.dtype),
        }

    def output(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """See the module."""
        words, scale = tensors["weight"], tensors["weight_scale"]
        bits = _bits(words, columns=x.shape[1])
        codes = unpack_bits(words.view(torch.uint8), dense_layout(bits)).reshape(-1, x.shape[1])
        signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
        weight = RowWeight(codes=signed, scale=scale.float().squeeze(-1), rotation=0)
        return add_bias(self.scheme.output(x, weight=weight, activation_bits=ACTIVATION_BITS), tensors)

    def files(self, model: ExportedModel) -> list[ExportFile]:
        """The folder's two files."""
        return diffusers_folder(model, model.all_tensors, quantization=self._quantization(model))

    def _quantization(self, model: ExportedModel) -> dict[str, Any]:
        columns = {layer.name: layer.in_features for layer in model.manifest.layers}
        widths = {name: _bits(ends["weight"], columns=columns[name]) for name, ends in model.layers.items()}
        usual = Counter(widths.values()).most_common(1)[0][0]
        alone = {name for name in model.other_matrices if any(name in layer for layer in widths)}
        dynamic: dict[str, Any] = {f"-:{_whole_name(name)}": {} for name in sorted(alone)}
        dynamic |= {f"+:{_whole_name(name)}": {"b_dtype": f"uint{b}"} for name, b in widths.items() if b != usual}
        return {
            "quant_method": "humming",
            "b_dtype": f"uint{usual}",
            "weight_scale_type": "channel",
            "weight_scale_group_size": 0,
            "has_zero_point": False,
            "a_dtype": f"int{ACTIVATION_BITS}",
            "input_scale_group_size": 0,
            "input_quant_mode": "dynamic_token",
            "modules_to_not_convert": [name for name in model.other_matrices if name not in alone],
            **({"dynamic": dynamic} if dynamic else {}),
        }


def _bits(words: Tensor, *, columns: int) -> int:
    """Width of the codes in words int32 [N, K b / 32]."""
    return words.shape[1] * WORD // columns


def _whole_name(name: str) -> str:
    """A regular expression that matches a module's name, whatever the runtime puts before it, from the start on."""
    return rf"(.*\.)?{re.escape(name)}$"
