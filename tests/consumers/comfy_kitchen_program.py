"""A program that compares layers of profile=convrot and int8 with comfy-kitchen's functions on the CPU; prints JSON."""

from __future__ import annotations

import json
from typing import Any

import torch
from comfy_kitchen.backends.eager import convrot_w4a4, quantization
from torch import Tensor, nn

from qvgen.config.bits import Bits
from qvgen.config.leaves import load_profile
from qvgen.initializers.mse import MeanSquaredError
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.fake_quant_product import rotated
from qvgen.layers.noise_band import NoiseBand
from qvgen.layers.packed_linear import PackedLinear


def made(name: str, bits: str, columns: int, rows: int = 96) -> tuple[FakeQuantLinear, Tensor]:
    """A layer of random weights under a profile, and inputs with a loud channel."""
    generator = torch.Generator().manual_seed(columns)
    linear = nn.Linear(columns, rows)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(rows, columns, generator=generator) * 0.05)
        linear.bias.copy_(torch.randn(rows, generator=generator))
    band = NoiseBand(1)
    band.set_timestep(torch.tensor([500.0]))
    layer = FakeQuantLinear(linear, profile=load_profile(name, Bits.parse(bits)).fitted([columns]), noise_band=band)
    MeanSquaredError().initialize_(layer, statistics=None)
    x = torch.randn(1, 200, columns, generator=generator)
    x[..., 3] *= 10
    return layer, x


def compare_convrot(bits: str, columns: int) -> dict[str, Any]:
    """Our packed layer against convrot_w4a4_linear in float32, whole and from the same rotated inputs on."""
    layer, x = made("convrot", bits, columns)
    packed, size = PackedLinear.from_fake_quant(layer), layer.profile.rotation
    weight = convrot_w4a4._pack_int4_row_major(layer.weight_quantizer.codes(layer.weight))
    scale = layer.weight_quantizer.qparams()[0].detach().reshape(-1)
    with torch.no_grad():
        ours = packed(x)[0]
    theirs = convrot_w4a4.convrot_w4a4_linear(x[0], weight, scale, layer.bias.detach(), convrot_groupsize=size)
    turned = rotated(x[0], layer.profile)
    rotation = convrot_w4a4._rotate_activation(x[0], convrot_w4a4._build_hadamard(size), size)
    codes, row_scale = convrot_w4a4._quantize_signed_int4_rowwise_unpacked(turned)
    same_input = convrot_w4a4.int4_linear(
        convrot_w4a4._pack_int4_row_major(codes), weight, row_scale, scale, layer.bias.detach(), torch.float32
    )
    return {
        "rotation": size,
        "rotation_difference": float((turned - rotation).norm() / rotation.norm()),
        "codes_equal": torch.equal(codes, packed.input_codes(x)),
        "difference": float((same_input - ours).abs().max()),
        "whole_difference": float((theirs - ours).norm() / ours.norm()),
    }


def compare_int8(bits: str, columns: int) -> dict[str, Any]:
    """Our packed layer's input codes, scales and outputs against comfy-kitchen's rows of int8."""
    layer, x = made("int8", bits, columns)
    packed = PackedLinear.from_fake_quant(layer)
    codes, row_scale = quantization.quantize_int8_rowwise(x[0])
    weight = layer.weight_quantizer.codes(layer.weight)
    scale = layer.weight_quantizer.qparams()[0].detach().reshape(1, -1)
    sums = codes.double() @ weight.double().t()
    with torch.no_grad():
        ours = packed(x)[0]
    return {
        "codes_equal": torch.equal(codes, packed.input_codes(x)),
        "difference": float((sums.float() * row_scale * scale + layer.bias.detach() - ours).abs().max()),
    }


if __name__ == "__main__":
    results = {f"convrot {b} {k}": compare_convrot(b, k) for b in ("w4a4", "w3a4") for k in (1536, 1920)}
    results |= {f"int8 {b} {k}": compare_int8(b, k) for b in ("w8a8", "w3a8") for k in (1536, 1920)}
    print(json.dumps(results))
