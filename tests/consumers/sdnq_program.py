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
    return {
        name: module.sdnq_dequantizer(module.weight, module.scale, zero_point=module.zero_point, skip_compile=True)
        for name, module in model.named_modules()
        if hasattr(module, "sdnq_dequantizer")
    }


def main(packed: Path, out: Path) -> dict[str, Any]:
    """Compare all layers."""
    ours = {
        name: layer.dequantized_weight()
        for name, layer in packed_layers(load_packed(packed, kernel="reference")).items()
    }
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
        found[name] = {"layers": len(theirs), "difference": distance, "kinds": kinds}
    return found


if __name__ == "__main__":
    with torch.no_grad():
        print(json.dumps([main(Path(one), Path(two)) for one, two in zip(sys.argv[1::2], sys.argv[2::2], strict=True)]))
