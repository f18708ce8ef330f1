"""A program that loads exports with SDNQ, by its own loader and through diffusers, on the CPU; prints JSON.

sdnq_program.py PACKED OUT ...

SDNQ is under the GPL: it is imported in this process alone, which nothing of qvgen's imports.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import sdnq
import torch
from diffusers import WanTransformer3DModel

from qvgen.deploy.checkpoint import load_packed
from qvgen.layers.swap import packed_layers


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Dequantized weights of the layers that SDNQ has made."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "sdnq_dequantizer"):
            made = module.sdnq_dequantizer
            options = {"skip_compile": True, "skip_quantized_matmul": made.use_quantized_matmul}
            found[name] = made(module.weight, module.scale, zero_point=module.zero_point, **options)
    return found


def products(model: torch.nn.Module, layers: dict[str, Any]) -> dict[str, Any] | None:
    """Outputs of the layers whose products SDNQ makes in 8 bits, beside ours; None where it makes none so."""
    own = {name: model.get_submodule(name) for name in layers}
    if not all(module.sdnq_dequantizer.use_quantized_matmul for module in own.values()):
        return None
    generator, largest, smallest = torch.Generator().manual_seed(0), 0.0, 1.0
    for name, layer in layers.items():
        layer.noise_band.set_timestep(torch.tensor([500.0]))
        x = torch.randn(1, 40, layer.in_features, generator=generator)
        wanted, plain = layer(x), torch.nn.functional.linear(x, layer.dequantized_weight(), layer.bias)
        largest = max(largest, float((own[name](x) - wanted).norm() / wanted.norm()))
        smallest = min(smallest, float((plain - wanted).norm() / wanted.norm()))
    return {"layers": len(own), "difference": largest, "inputs_count": smallest}


def main(packed: Path, out: Path) -> dict[str, Any]:
    """Compare all layers."""
    layers = packed_layers(load_packed(packed, kernel="reference"))
    ours = {name: layer.dequantized_weight() for name, layer in layers.items()}
    models = {
        "loader": sdnq.load_sdnq_model(str(out), model_cls=WanTransformer3DModel, dtype=torch.float32),
        "diffusers": WanTransformer3DModel.from_pretrained(out, torch_dtype=torch.float32),
    }
    found: dict[str, Any] = {}
    for name, model in models.items():
        theirs = weights_of(model)
        assert theirs.keys() == ours.keys(), (name, theirs.keys() ^ ours.keys())
        distance = max(float((theirs[key] - ours[key]).abs().max() / ours[key].abs().max()) for key in ours)
        kinds = sorted({model.get_submodule(key).sdnq_dequantizer.weights_dtype for key in ours})
        found[name] = {
            "layers": len(theirs),
            "difference": distance,
            "kinds": kinds,
            "products": products(model, layers),
        }
    return found


if __name__ == "__main__":
    with torch.no_grad():
        print(json.dumps([main(Path(one), Path(two)) for one, two in zip(sys.argv[1::2], sys.argv[2::2], strict=True)]))
