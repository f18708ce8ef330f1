"""A program that loads exports with diffusers and torchao on the CPU and compares dequantized weights; prints JSON.

torchao_program.py PACKED OUT ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torchao.core.config import config_to_dict
from torchao.quantization import IntxUnpackedToInt8Tensor, IntxWeightOnlyConfig, PerAxis

from qvgen.deploy.checkpoint import load_packed
from qvgen.deploy.fixed_inputs import fixed_inputs
from qvgen.layers.swap import packed_layers


def main(packed: Path, out: Path) -> dict[str, Any]:
    """Compare all layers, and say how the loaded model's output differs from one with our weights."""
    model = WanTransformer3DModel.from_pretrained(out, torch_dtype=torch.float32)
    layers = packed_layers(load_packed(packed, kernel="reference"))
    found: dict[str, Any] = {"layers": 0, "equal": True, "kinds": set()}
    for name, layer in layers.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, IntxUnpackedToInt8Tensor), name
        found["equal"] &= torch.equal(weight.dequantize(), layer.dequantized_weight())
        found["equal"] &= torch.equal(model.get_submodule(name).bias, layer.bias)
        found["kinds"].add((str(weight.target_dtype), weight.block_size[1] == layer.in_features))
        found["layers"] += 1
    inputs = fixed_inputs(model, timestep=500.0)
    assert inputs is not None
    output = model(**inputs, return_dict=False)[0]
    for name, layer in layers.items():
        model.get_submodule(name).weight = torch.nn.Parameter(layer.dequantized_weight(), requires_grad=False)
    found["output"] = float((model(**inputs, return_dict=False)[0] - output).abs().max())
    config = json.loads((out / "config.json").read_text())["quantization_config"]["quant_type"]["default"]
    bits = config["_data"]["weight_dtype"]["_data"]
    found["config"] = config == config_to_dict(
        IntxWeightOnlyConfig(weight_dtype=getattr(torch, bits), granularity=PerAxis(0))
    )
    return {**found, "kinds": sorted(found["kinds"])}


if __name__ == "__main__":
    with torch.no_grad():
        print(json.dumps([main(Path(one), Path(two)) for one, two in zip(sys.argv[1::2], sys.argv[2::2], strict=True)]))
