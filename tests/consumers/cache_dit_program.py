"""A program that packs with cache-dit's packer and loads an export with cache-dit's loader, on the CPU; prints JSON.

cache_dit_program.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from cache_dit.quantization.svdquant.linear import SVDQW4A4Linear
from cache_dit.quantization.svdquant.packing import pack_svdq_w4a4_linear_tensors
from cache_dit.quantization.svdquant.ptq import load_svdq
from diffusers import WanTransformer3DModel
from torch import nn

from qvgen.config.bits import Bits
from qvgen.config.leaves import load_leaf, load_profile
from qvgen.initializers.rtn import RoundToNearest
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.noise_band import NoiseBand
from qvgen.layers.packed_linear import PackedLinear

SHAPES = {"wan": (1536, 1536), "wan ffn": (256, 8960), "cogvideox": (1920, 1920), "odd": (96, 192)}


def layer_of(rows: int, columns: int, rank: int) -> PackedLinear:
    """A packed layer with smoothing and a branch, of random values."""
    generator = torch.Generator().manual_seed(rows + columns)
    linear = nn.Linear(columns, rows)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(rows, columns, generator=generator) * 0.05)
        linear.bias.copy_(torch.randn(rows, generator=generator))
    profile = load_profile("svdq_g64", Bits.parse("w4a4"))
    layer = FakeQuantLinear(linear, profile=profile, noise_band=NoiseBand(1))
    RoundToNearest().initialize_(layer, statistics=None)
    smooth = torch.rand(columns, generator=generator) + 0.5
    layer.declare_(profile=profile, input_scale=smooth)
    layer.input_scale.copy_(smooth)
    layer.set_branch_(*(torch.randn(*shape, generator=generator) for shape in ((rank, columns), (rows, rank))))
    return PackedLinear.from_fake_quant(layer)


def packs_alike(rows: int, columns: int) -> dict[str, bool]:
    """Whether our tensors are those of cache-dit's packer, byte for byte."""
    rank = 32
    layer = layer_of(rows, columns, rank)
    ours = load_leaf("export", "cache_dit", rank=rank).tensors(layer)
    scale = layer.weight_scale.reshape(rows, 1, -1, 1)
    weight = layer.dequantized_weight().bfloat16()
    qweight, wscales, bias, smooth, lora, _ = pack_svdq_w4a4_linear_tensors(
        weight,
        scale.bfloat16(),
        bias=layer.bias.detach().bfloat16(),
        smooth=layer.input_scale.reciprocal().bfloat16(),
        lora=(layer.branch_down, layer.branch_up),
    )
    theirs = {
        "qweight": qweight, "wscales": wscales, "bias": bias, "smooth_factor": smooth,
        "proj_down": lora[0], "proj_up": lora[1],
    }  # fmt: skip
    return {name: ours[name].dtype == value.dtype and torch.equal(ours[name], value) for name, value in theirs.items()}


def loads(out: Path) -> dict[str, Any]:
    """Whether cache-dit's loader takes the directory into the folded folder, and what it then holds."""
    model = WanTransformer3DModel.from_pretrained(out / "transformer", torch_dtype=torch.bfloat16)
    model = load_svdq(model, str(out / "svdq"))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SVDQW4A4Linear)}
    return {"layers": len(layers), "ranks": sorted({layer.rank for layer in layers.values()})}


if __name__ == "__main__":
    with torch.no_grad():
        packed = {name: packs_alike(*shape) for name, shape in SHAPES.items()}
        print(json.dumps({"packed": packed, "loaded": loads(Path(sys.argv[1]))}))
