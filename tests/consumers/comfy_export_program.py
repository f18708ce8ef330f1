"""A program that loads a file of `qvgen export` with comfy-kitchen's own classes on the CPU, as ComfyUI does; prints JSON.

    comfy_export_program.py PACKED FILE [PACKED FILE ...]

For every marked layer, which may be several of diffusers' layers: comfy-kitchen's QuantizedTensor of the stored tensors, its
dequantized weight against the packed layers', and its linear function against the packed layers on inputs that are rotated
alike.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from comfy_kitchen.backends.eager import convrot_w4a4, quantization
from comfy_kitchen.tensor import QuantizedTensor, TensorCoreConvRotW4A4Layout, TensorWiseINT8Layout
from safetensors.torch import load_file
from torch import Tensor

from qvgen.deploy.checkpoint import load_packed
from qvgen.deploy.exporters.plain_weight import plain_weight
from qvgen.layers.fake_quant_product import rotated
from qvgen.layers.packed_linear import PackedLinear
from qvgen.layers.swap import packed_layers
from qvgen.models.original.names import ORIGINAL_NAMES
from qvgen.models.original.tensors import original_sources


def quantized(tensors: dict[str, Tensor], name: str, rows: int, columns: int) -> tuple[QuantizedTensor, dict[str, Any]]:
    """The tensor that ComfyUI makes of a layer's entries, and the layer's marker."""
    marker = json.loads(bytes(tensors[f"{name}.comfy_quant"].tolist()))
    common = {
        "scale": tensors[f"{name}.weight_scale"],
        "orig_dtype": torch.float32,
        "orig_shape": (rows, columns),
    }
    if marker["format"] == "convrot_w4a4":
        params = TensorCoreConvRotW4A4Layout.Params(
            **common, convrot_groupsize=marker["convrot_groupsize"], linear_dtype=marker["linear_dtype"]
        )
        return QuantizedTensor(tensors[f"{name}.weight"], "TensorCoreConvRotW4A4Layout", params), marker
    params = TensorWiseINT8Layout.Params(
        **common, convrot=marker.get("convrot", False), convrot_groupsize=marker.get("convrot_groupsize", 256)
    )
    return QuantizedTensor(tensors[f"{name}.weight"], "TensorWiseINT8Layout", params), marker


def input_codes(marker: dict[str, Any], turned: Tensor) -> Tensor:
    """comfy-kitchen's codes of inputs that are rotated."""
    if marker.get("linear_dtype") == "int4":
        return convrot_w4a4._quantize_signed_int4_rowwise_unpacked(turned)[0]
    return quantization.quantize_int8_rowwise(turned)[0]


def outputs(tensors: dict[str, Tensor], name: str, layer: PackedLinear, marker: dict[str, Any], x: Tensor) -> Tensor:
    """comfy-kitchen's eager product of stored tensors, from rotated inputs on (it sums a rotation in another order)."""
    weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
    bias, turned = tensors[f"{name}.bias"].float(), rotated(x, layer.profile)
    if marker["format"] == "convrot_w4a4" and marker["linear_dtype"] == "int4":
        codes, row_scale = convrot_w4a4.quantize_signed_int4_rowwise(turned)
        return convrot_w4a4.int4_linear(codes, weight, row_scale, scale, bias, torch.float32)
    if marker["format"] == "convrot_w4a4":
        weight = convrot_w4a4.prepare_int4_weight_for_int8_linear(weight)
    return quantization.int8_linear(turned, weight, scale, bias, torch.float32)


def main(packed: Path, file: Path) -> dict[str, Any]:
    """Compare all layers."""
    tensors = load_file(file)
    found: dict[str, Any] = {
        "layers": 0,
        "codes_equal": True,
        "weight": 0.0,
        "output": 0.0,
        "linear": 0.0,
        "formats": set(),
    }
    model = load_packed(packed, kernel="reference")
    layers = packed_layers(model)
    sources = original_sources([f"{name}.bias" for name in layers], ORIGINAL_NAMES[type(model).__name__])
    for key, parts in (
        (bias.removesuffix(".bias"), [layers[name.removesuffix(".bias")] for name in names])
        for bias, names in sources.items()
    ):
        layer = parts[0]
        weight, marker = quantized(tensors, key, sum(part.out_features for part in parts), layer.in_features)
        biases = tensors[f"{key}.bias"].float().split([part.out_features for part in parts])
        for part, bias in zip(parts, biases, strict=True):
            part.bias.data = bias
            part.noise_band.set_timestep(torch.tensor([500.0]))
        x = torch.randn(1, 64, layer.in_features, generator=torch.Generator().manual_seed(layer.in_features))
        ours = torch.cat([part(x)[0] for part in parts], -1)
        plain = torch.cat([plain_weight(part) for part in parts])
        codes = input_codes(marker, rotated(x[0], layer.profile))
        found["codes_equal"] &= torch.equal(codes, layer.input_codes(x))
        differences = {
            "weight": (weight.dequantize() - plain).abs().max() / plain.abs().max(),
            "output": (outputs(tensors, key, layer, marker, x[0]) - ours).abs().max() / ours.abs().max(),
        }
        if marker.get("linear_dtype") != "int8":  # the CPU's whole function knows 4-bit inputs alone
            whole = torch.nn.functional.linear(x[0], weight, tensors[f"{key}.bias"].float())
            differences["linear"] = (whole - ours).norm() / ours.norm()
        for what, difference in differences.items():
            found[what] = max(found[what], float(difference))
        found["layers"] += 1
        found["formats"].add(marker["format"])
    return {**found, "formats": sorted(found["formats"])}


if __name__ == "__main__":
    with torch.no_grad():
        print(json.dumps([main(Path(one), Path(two)) for one, two in zip(sys.argv[1::2], sys.argv[2::2], strict=True)]))
