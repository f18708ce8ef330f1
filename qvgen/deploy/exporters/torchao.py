"""torchao (0.18): a folder of a diffusers transformer whose weights are ``IntxUnpackedToInt8Tensor``, to compare with.

    NAME._weight_qdata        int8 [N, K]     codes of b bits from -2^(b-1) on: ours, those with a zero point minus 2^(b-1)
    NAME._weight_scale        float32 [N, G]
    NAME._weight_zero_point   int8 [N, G]     0 for symmetric weights, else ours minus 2^(b-1)
    NAME.bias                 [N]
    header                    for each tensor its class and attributes as JSON, and "tensor_names": what torchao's own
                              ``unflatten_tensor_state_dict`` reads
    config.json               the transformer's own, with "quantization_config": {"quant_method": "torchao", ...}

    W = (q - z) s in float32, rounded to the model's precision,   y = x W^T + bias

Codes lie in 8-bit storage whatever their width, and products are in floating point: it saves neither memory nor time.
"""

from __future__ import annotations

import json
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
from qvgen.deploy.exporters.diffusers_folder import diffusers_folder
from qvgen.deploy.exporters.grid_weight import grid_weight, grid_weight_fit
from qvgen.layers.packed_linear import PackedLinear
from qvgen.quant.grid import ZeroPointKind

ZERO_POINTS: tuple[ZeroPointKind, ...] = ("none", "integer")
DATA, SCALE, ZERO_POINT = (f"_weight_{part}" for part in ("qdata", "scale", "zero_point"))


@dataclass(frozen=True, kw_only=True)
class TorchAo:
    """The target; it implements :class:`qvgen.deploy.exporters.base.Exporter`.

    Attributes:
        dtype: Precision of biases, of all other weights, and of weights that were dequantized: float32, bfloat16 or float16;
            None: as in the packed checkpoint, and float32 for the layers that were quantized.
    """

    dtype: str | None

    runtime: ClassVar[str] = "diffusers with torchao"
    profiles: ClassVar[tuple[str, ...]] = ("paper", "int8", "w4a8_row")
    needs_original_names: ClassVar[bool] = False
    bound: ClassVar[str] = (
        "Inputs are not quantized: it shows what the weights alone cost. diffusers rounds scales to the precision that it is "
        "asked to load, so only float32 gives these weights."
    )

    def __post_init__(self) -> None:
        check_dtype(self.dtype)

    def fit(self, layer: PackedLinear) -> Fit:
        """Whether the layer's codes are carried as they are."""
        return grid_weight_fit(layer, zero_points=ZERO_POINTS)

    def tensors(self, layer: PackedLinear) -> dict[str, Tensor]:
        """The layer's tensors."""
        weight = grid_weight(layer, zero_points=ZERO_POINTS)
        shift = 0 if weight.grid.symmetric else 2 ** (weight.grid.bits - 1)
        return {
            DATA: (weight.codes.to(torch.int16) - shift).to(torch.int8),
            SCALE: weight.scale,
            ZERO_POINT: (weight.zero_point - shift).to(torch.int8),
            **bias_tensor(layer, self.dtype),
        }

    def output(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """See the module."""
        scale = tensors[SCALE]
        groups = tensors[DATA].float().unflatten(-1, (scale.shape[1], -1))
        weight = (groups - tensors[ZERO_POINT].float().unsqueeze(-1)) * scale.unsqueeze(-1)
        return add_bias(x @ cast(weight.flatten(1), self.dtype).float().t(), tensors)

    def files(self, model: ExportedModel) -> list[ExportFile]:
        """The folder's two files."""
        quantization = {
            "quant_method": "torchao",
            "quant_type": {"default": _weight_only(model.manifest.layers[0].form.profile.weight.bits)},
            "modules_to_not_convert": model.other_matrices,
        }
        metadata = self._metadata(model)
        return diffusers_folder(model, model.all_tensors, quantization=quantization, metadata=metadata)

    def _metadata(self, model: ExportedModel) -> dict[str, str]:
        """The header: every tensor of the transformer as torchao names it."""
        known: dict[str, Any] = {name: {"_type": "Tensor"} for name in model.rest}
        for layer in model.manifest.layers:
            ends = model.layers[layer.name]
            data = {
                "target_dtype": _dtype(f"int{layer.form.profile.weight.bits}"),
                "block_size": [1, layer.in_features // ends[SCALE].shape[1]],
                "dtype": _dtype(self.dtype or "float32"),
                "activation_quantization": None,
            }
            parts = ["qdata", "scale", "zero_point"]
            known[f"{layer.name}.weight"] = {
                "_type": "IntxUnpackedToInt8Tensor",
                "_data": data,
                "_tensor_data_names": parts,
            }
            known |= {f"{layer.name}.bias": {"_type": "Tensor"}} if "bias" in ends else {}
        return {name: json.dumps(entry) for name, entry in known.items()} | {"tensor_names": json.dumps(list(known))}


def _dtype(name: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": name}


def _weight_only(bits: int) -> dict[str, Any]:
    """The JSON of IntxWeightOnlyConfig: a loader looks at the class alone, each weight says its own bits and groups."""
    data = {
        "weight_dtype": _dtype(f"int{bits}"),
        "granularity": {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}},
        "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
        "scale_dtype": None,
        "intx_packing_format": {"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
        "intx_choose_qparams_algorithm": {"_type": "IntxChooseQParamsAlgorithm", "_data": "AFFINE"},
    }
    return {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": data}
