"""Codes in 8-bit storage: ComfyUI's int8_tensorwise (comfy-kitchen 0.2.40), LightX2V and DiffSynth-Studio.

    NAME.weight        int8 [N, K]       codes of 2 to 8 bits
    NAME.weight_scale  float32 [N, 1]
    NAME.comfy_quant   uint8 [...]       JSON {"format": "int8_tensorwise"}, and where the weight is rotated
                                         {"convrot": true, "convrot_groupsize": g}, which only ComfyUI reads
    NAME.bias          [N]

    y = float32(sum q_x q_w) s_x s_w + bias,   q_x of 8 bits per token by a division

:mod:`qvgen.deploy.exporters.row_scheme` has the arithmetic. Names are the original code's, without a prefix. It runs on
every GPU with 8-bit tensor cores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qvgen.deploy.exporters.base import ExportedModel, ExportFile, Fit, add_bias, bias_tensor, check_dtype
from qvgen.deploy.exporters.comfy_marker import marker_tensor, read_marker
from qvgen.deploy.exporters.original_file import original_file
from qvgen.deploy.exporters.row_scheme import RowScheme, RowWeight
from qvgen.layers.packed_linear import PackedLinear

ACTIVATION_BITS = 8


@dataclass(frozen=True, kw_only=True)
class Int8:
    """The target; it implements :class:`qvgen.deploy.exporters.base.Exporter`.

    Attributes:
        dtype: Precision of biases and of what is not quantized: float32, bfloat16 or float16; None: as in the packed
            checkpoint.
    """

    dtype: str | None

    runtime: ClassVar[str] = "ComfyUI (comfy-kitchen, int8_tensorwise) and LightX2V"
    profiles: ClassVar[tuple[str, ...]] = ("int8", "convrot")
    needs_original_names: ClassVar[bool] = True
    bound: ClassVar[str] = (
        "Runtimes multiply the two scales in an order of their own (a last bit of float32) and round outputs to the model's "
        "precision."
    )
    scheme: ClassVar[RowScheme] = RowScheme(
        weight_bits=8, activation_bits=(ACTIVATION_BITS,), rotations=(0, 256, 64, 16)
    )

    def __post_init__(self) -> None:
        check_dtype(self.dtype)

    def fit(self, layer: PackedLinear) -> Fit:
        """Whether the layer's codes and inputs are the runtime's."""
        return self.scheme.fit(layer)

    def tensors(self, layer: PackedLinear) -> dict[str, Tensor]:
        """The layer's tensors and its marker."""
        weight = self.scheme.weight(layer)
        turned = {"convrot": True, "convrot_groupsize": weight.rotation} if weight.rotation else {}
        return {
            "weight": weight.codes,
            "weight_scale": weight.scale.unsqueeze(-1),
            "comfy_quant": marker_tensor({"format": "int8_tensorwise", **turned}),
            **bias_tensor(layer, self.dtype),
        }

    def output(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """See the module."""
        marker = read_marker(tensors["comfy_quant"])
        weight = RowWeight(
            codes=tensors["weight"],
            scale=tensors["weight_scale"].squeeze(-1),
            rotation=marker.get("convrot_groupsize", 0),
        )
        return add_bias(self.scheme.output(x, weight=weight, activation_bits=ACTIVATION_BITS), tensors)

    def files(self, model: ExportedModel) -> list[ExportFile]:
        """One file."""
        return [original_file(model, model.all_tensors)]
