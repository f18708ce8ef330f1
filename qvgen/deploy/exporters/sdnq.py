"""SDNQ (format of sdnq 0.2.8; SD.Next, diffusers): a folder of a diffusers transformer, weights alone quantized.

    NAME.weight       uint8          codes by the layouts below, [N K / c, bytes] (widths of 2 and 4 bits: [N K / c]);
                                     of 8 bits int8 or uint8 [N, K], in groups [N, G, g]
    NAME.scale        float32 [N, 1], in groups [N, G, 1]
    NAME.zero_point   float32, likewise; weights with a zero point alone
    NAME.bias         [N]
    config.json       the transformer's own, with "quantization_config": {"quant_method": "sdnq", "weights_dtype", ...}

    symmetric         int<b>    stored q + 2^(b-1) (8 bits: q),   W = q scale
    with zero point   uint<b>   stored q,                         W = zero_point + q scale,   zero_point = -(scale z)
    y = x W^T + bias

With ``use_quantized_matmul`` SDNQ quantizes the inputs of calls of at least 32 rows, as other calls are dequantized:

    s_x = max|x| / 127,   q_x = rne(x / s_x),   y = float32(sum q_x q_w) s_x s_w + bias

Then 8-bit codes are stored the other way round, int8 [K, N] with scales [1, N]; narrower ones as above.

Below, a byte's places from the lowest on, ``k.i`` for bit i of code k of a group of c codes; 2 and 4 bits have no gaps, the
first code in the lowest bits:

    3 bits, c = 8     byte j < 3: j.0-2, (j+3).0-2, then 6.0 6.1 | 7.0 7.1 | 6.2 7.2
    5 bits, c = 8     byte j < 5: j.0-4, then 5.0-2 | 6.0-2 | 7.0-2 | 5.3 5.4 7.4 | 6.3 6.4 7.3
    6 bits, c = 4     byte j < 3: j.0-5, then 3.4 3.5 | 3.2 3.3 | 3.0 3.1
    7 bits, c = 8     byte j < 7: j.0-6, then 7.(6-j)

SDNQ is under the GPL: what stands above is its format, and none of its code is imported or copied. Left out: its
own rotation, low-rank branch, quantized scales, floating-point codes, and 8-bit products of weights with zero points, whose
inputs have one scale each where ours with zero points have two bounds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qvgen.deploy.exporters.base import (
    ExportedModel,
    ExportFile,
    Fit,
    add_bias,
    bias_tensor,
    cast,
    check_dtype,
)
from qvgen.deploy.exporters.bit_layout import Layout, dense_layout, pack_bits, unpack_bits
from qvgen.deploy.exporters.diffusers_folder import diffusers_folder
from qvgen.deploy.exporters.grid_weight import GridWeight, grid_weight, grid_weight_fit
from qvgen.deploy.exporters.row_scheme import RowScheme, RowWeight
from qvgen.errors import UserError
from qvgen.layers.packed_linear import PackedLinear
from qvgen.quant.grid import Grid, ZeroPointKind

ZERO_POINTS: tuple[ZeroPointKind, ...] = ("none", "integer", "real")
WHOLE_GROUPS = 8
"""Codes of the largest group of bytes."""
PRODUCT_SIZE, PRODUCT_MULTIPLE = 32, 16
"""Fewest rows and columns of a weight that SDNQ multiplies in 8 bits, and what they are multiples of."""


def _with_tails(bits: int, tails: Mapping[int, str]) -> Layout:
    """Bytes that begin with the whole codes of ``bits`` bits and end with the places that are given."""
    whole = 8 // bits
    layout = []
    for byte, text in tails.items():
        heads = [(byte + len(tails) * code, bit) for code in range(whole) for bit in range(bits)]
        ends = [tuple(map(int, place.split("."))) for place in text.split()]
        layout.append((*heads, *((code, bit) for code, bit in ends)))
    return tuple(layout)


LAYOUTS: Mapping[int, Layout] = {
    2: dense_layout(2)[:1],
    3: _with_tails(3, {0: "6.0 6.1", 1: "7.0 7.1", 2: "6.2 7.2"}),
    4: dense_layout(4)[:1],
    5: _with_tails(5, {0: "5.0 5.1 5.2", 1: "6.0 6.1 6.2", 2: "7.0 7.1 7.2", 3: "5.3 5.4 7.4", 4: "6.3 6.4 7.3"}),
    6: _with_tails(6, {0: "3.4 3.5", 1: "3.2 3.3", 2: "3.0 3.1"}),
    7: _with_tails(7, {byte: f"7.{6 - byte}" for byte in range(7)}),
}


@dataclass(frozen=True, kw_only=True)
class Sdnq:
    """The target; it implements :class:`qvgen.deploy.exporters.base.Exporter`.

    Attributes:
        dtype: Precision of biases, of all other weights, and of weights that were dequantized: float32, bfloat16 or float16;
            None: as in the packed checkpoint, and float32 for the layers that were quantized.
        quantized_inputs: SDNQ quantizes inputs to 8 bits and multiplies integers; False leaves inputs as they are.
    """

    dtype: str | None
    quantized_inputs: bool

    runtime: ClassVar[str] = "SDNQ (SD.Next, diffusers)"
    needs_original_names: ClassVar[bool] = False
    scheme: ClassVar[RowScheme] = RowScheme(weight_bits=8, activation_bits=(8,), rotations=(0,), own_width=True)

    def __post_init__(self) -> None:
        check_dtype(self.dtype)

    @property
    def profiles(self) -> tuple[str, ...]:
        """See :class:`qvgen.deploy.exporters.base.Target`."""
        return ("int8",) if self.quantized_inputs else ("paper", "int8", "w4a8_row")

    @property
    def bound(self) -> str:
        """See :class:`qvgen.deploy.exporters.base.Target`."""
        if self.quantized_inputs:
            return f"Calls of fewer than {PRODUCT_SIZE} rows are not quantized; outputs are rounded to the model's precision."
        return "Inputs are not quantized: it shows what the weights alone cost."

    def fit(self, layer: PackedLinear) -> Fit:
        """Whether the layer's codes are carried as they are; weights with a zero point up to the last bits of float32."""
        if layer.out_features * layer.in_features % WHOLE_GROUPS:
            shape = f"{layer.out_features} x {layer.in_features}"
            raise UserError(f"its {shape} codes do not fill groups of {WHOLE_GROUPS}; leave it out of model.include")
        if self.quantized_inputs:
            sizes = (layer.out_features, layer.in_features)
            if min(sizes) < PRODUCT_SIZE or any(size % PRODUCT_MULTIPLE for size in sizes):
                raise UserError(
                    f"SDNQ multiplies weights of multiples of {PRODUCT_MULTIPLE} from {PRODUCT_SIZE} on in 8 bits, and this "
                    f"one is {sizes[0]} x {sizes[1]}; write export.quantized_inputs=false, or leave it out of model.include"
                )
            return self.scheme.fit(layer)
        return grid_weight_fit(layer, zero_points=ZERO_POINTS)

    def tensors(self, layer: PackedLinear) -> dict[str, Tensor]:
        """The layer's tensors."""
        weight = self._weight(layer)
        bits, symmetric = weight.grid.bits, weight.grid.symmetric
        ends = (-1,) if weight.grid.group_size is None else (weight.scale.shape[1], -1)
        codes = weight.codes.unflatten(-1, ends)
        if bits in LAYOUTS:
            unsigned = (codes.to(torch.int16) + (2 ** (bits - 1) if symmetric else 0)).to(torch.uint8)
            codes = pack_bits(unsigned, LAYOUTS[bits])
            codes = codes.flatten() if len(LAYOUTS[bits]) == 1 else codes
        scale = weight.scale.reshape(layer.out_features, *ends[:-1], 1)
        if self.quantized_inputs and bits not in LAYOUTS:
            codes, scale = codes.t().contiguous(), scale.t().contiguous()
        zero_point = {} if symmetric else {"zero_point": -(scale * weight.zero_point.reshape(scale.shape))}
        return {"weight": codes, "scale": scale, **zero_point, **bias_tensor(layer, self.dtype)}

    def _weight(self, layer: PackedLinear) -> GridWeight:
        if not self.quantized_inputs:
            return grid_weight(layer, zero_points=ZERO_POINTS)
        row = self.scheme.weight(layer)
        scale = row.scale.reshape(-1, 1)
        grid = Grid(bits=layer.profile.weight.bits, granularity="per_channel", zero_point="none")
        return GridWeight(codes=row.codes, scale=scale, zero_point=torch.zeros_like(scale), grid=grid)

    def output(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """See the module."""
        if self.quantized_inputs:
            scale = tensors["scale"].flatten()
            codes = _codes(tensors, columns=x.shape[1])
            y = self.scheme.output(x, weight=RowWeight(codes=codes, scale=scale, rotation=0), activation_bits=8)
            return add_bias(y, tensors)
        weight = dequantized(tensors, columns=x.shape[1])
        return add_bias(x @ cast(weight, self.dtype).float().t(), tensors)

    def files(self, model: ExportedModel) -> list[ExportFile]:
        """The folder's two files."""
        entries = model.manifest.layers
        kinds = {entry.name: _kind(model.layers[entry.name], columns=entry.in_features) for entry in entries}
        usual = Counter(kinds.values()).most_common(1)[0][0]
        product = {"use_quantized_matmul": True} if self.quantized_inputs else {}
        others = {f"{name}.weight": {**_options(*kind), **product} for name, kind in kinds.items() if kind != usual}
        quantization = {
            "quant_method": "sdnq",
            **_options(*usual),
            **product,
            "dequantize_fp32": True,
            "modules_to_not_convert": [f"{name}.weight" for name in model.other_matrices],
            "modules_quant_config": others,
        }
        return diffusers_folder(model, model.all_tensors, quantization=quantization)


def dequantized(tensors: Mapping[str, Tensor], *, columns: int) -> Tensor:
    """The weight float32 [N, K] of stored tensors, as SDNQ makes it."""
    scale = tensors["scale"]
    scale = scale.t() if _turned(tensors) else scale
    values = _codes(tensors, columns=columns).reshape(*scale.shape[:-1], -1).float()
    if "zero_point" in tensors:
        return (tensors["zero_point"] + values * scale).flatten(1)
    return (values * scale).flatten(1)


def _codes(tensors: Mapping[str, Tensor], *, columns: int) -> Tensor:
    """The codes [N, K], those of weights without a zero point signed."""
    stored, bits = tensors["weight"], _bits(tensors, columns=columns)
    if bits not in LAYOUTS:
        return stored.t() if _turned(tensors) else stored.flatten(1)
    codes = unpack_bits(stored, LAYOUTS[bits]).reshape(-1, columns)
    return codes if "zero_point" in tensors else codes.to(torch.int8) - 2 ** (bits - 1)


def _turned(tensors: Mapping[str, Tensor]) -> bool:
    """Whether 8-bit codes are stored [K, N], whose scales are one row."""
    return tensors["scale"].ndim == 2 and tensors["scale"].shape[0] == 1 < tensors["scale"].shape[1]


def _bits(tensors: Mapping[str, Tensor], *, columns: int) -> int:
    """Width of the stored codes of a weight of K columns."""
    scale = tensors["scale"]
    rows = scale.shape[0] if scale.ndim == 3 else scale.numel()
    return tensors["weight"].numel() * 8 // (rows * columns)


def _kind(tensors: Mapping[str, Tensor], *, columns: int) -> tuple[str, int]:
    """SDNQ's name of the stored type, and the columns of a group, -1 for whole rows."""
    groups = tensors["scale"].shape[1] if tensors["scale"].ndim == 3 else 1
    unsigned = "u" if "zero_point" in tensors else ""
    return f"{unsigned}int{_bits(tensors, columns=columns)}", columns // groups if groups > 1 else -1


def _options(weights_dtype: str, group_size: int) -> dict[str, Any]:
    return {"weights_dtype": weights_dtype, "group_size": group_size}
