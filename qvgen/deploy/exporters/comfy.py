"""ComfyUI's convrot_w4a4 (comfy-kitchen 0.2.40): 4-bit rows after a regular Hadamard rotation, inputs of 4 or 8 bits.

    NAME.weight        int8 [N, K/2]     codes -7..7 row by row, two to a byte, the even column in the low nibble
    NAME.weight_scale  float32 [N]
    NAME.comfy_quant   uint8 [...]       JSON {"format": "convrot_w4a4", "convrot_groupsize": g, "linear_dtype": "int4"}
    NAME.bias          [N]

    y = float32(sum q_x q_w) s_x s_w + bias,   q_x of H x by a division (:mod:`qvgen.deploy.exporters.row_scheme`)

``linear_dtype`` is "int4" for inputs of 4 bits and "int8" for inputs of 8; where a GPU has no 4-bit tensor cores (sm_90 and
later) "int4" computes the same integers in 8 bits. 2- and 3-bit codes lie in 4-bit storage. Names are the original code's,
without a prefix. K is a multiple of 64 and of g. Left out: comfy-kitchen's other layouts of 4-bit weights, which have no
uniform grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qvgen.deploy.exporters.base import ExportedModel, ExportFile, Fit, add_bias, bias_tensor, check_dtype
from qvgen.deploy.exporters.comfy_marker import marker_tensor, read_marker
from qvgen.deploy.exporters.nibbles import pack_signed_nibbles, unpack_signed_nibbles
from qvgen.deploy.exporters.original_file import original_file
from qvgen.deploy.exporters.row_scheme import RowScheme, RowWeight
from qvgen.errors import UserError
from qvgen.layers.packed_linear import PackedLinear

K_MULTIPLE = 64
"""Columns of a group of the runtime's 4-bit product."""


@dataclass(frozen=True, kw_only=True)
class Comfy:
    """The target; it implements :class:`qvgen.deploy.exporters.base.Exporter`.

    Attributes:
        dtype: Precision of biases and of what is not quantized: float32, bfloat16 or float16; None: as in the packed
            checkpoint.
    """

    dtype: str | None

    runtime: ClassVar[str] = "ComfyUI (comfy-kitchen, convrot_w4a4)"
    profiles: ClassVar[tuple[str, ...]] = ("convrot",)
    needs_original_names: ClassVar[bool] = True
    bound: ClassVar[str] = (
        "A GPU adds up the rotation in another order, with inputs of 8 bits multiplies the two scales first (a last bit of "
        "float32), and rounds outputs to the model's precision."
    )
    scheme: ClassVar[RowScheme] = RowScheme(weight_bits=4, activation_bits=(4, 8), rotations=(256, 64, 16))

    def __post_init__(self) -> None:
        check_dtype(self.dtype)

    def fit(self, layer: PackedLinear) -> Fit:
        """Whether the layer's codes and inputs are the runtime's."""
        if layer.in_features % K_MULTIPLE:
            raise UserError(f"in_features={layer.in_features} is no multiple of {K_MULTIPLE}, as ComfyUI's layers need")
        return self.scheme.fit(layer)

    def tensors(self, layer: PackedLinear) -> dict[str, Tensor]:
        """The layer's tensors and its marker."""
        weight = self.scheme.weight(layer)
        marker = {
            "format": "convrot_w4a4",
            "convrot_groupsize": weight.rotation,
            "linear_dtype": f"int{self.scheme.input_bits(layer)}",
        }
        return {
            "weight": pack_signed_nibbles(weight.codes),
            "weight_scale": weight.scale,
            "comfy_quant": marker_tensor(marker),
            **bias_tensor(layer, self.dtype),
        }

    def output(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """See the module."""
        marker = read_marker(tensors["comfy_quant"])
        weight = RowWeight(
            codes=unpack_signed_nibbles(tensors["weight"]),
            scale=tensors["weight_scale"],
            rotation=marker["convrot_groupsize"],
        )
        bits = {"int4": 4, "int8": 8}[marker["linear_dtype"]]
        return add_bias(self.scheme.output(x, weight=weight, activation_bits=bits), tensors)

    def files(self, model: ExportedModel) -> list[ExportFile]:
        """One file."""
        return [original_file(model, model.all_tensors)]
