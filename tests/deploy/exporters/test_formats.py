"""Bytes of each format, derived here in plain loops from the descriptions, and the arithmetic against the packed layer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qvgen.config.leaves import load_leaf
from qvgen.deploy.exporters import svdq_layer, svdq_tiles
from qvgen.deploy.exporters.comfy_marker import read_marker
from qvgen.deploy.exporters.nibbles import pack_signed_nibbles, unpack_signed_nibbles
from qvgen.deploy.exporters.plain_weight import plain_weight
from qvgen.errors import UserError
from tests.deploy.exporters.packed_models import packed_layer

EXACT = [
    ("comfy", "convrot", "w4a4", "w4a4"),
    ("comfy", "convrot", "w3a8", "w3a8"),
    ("int8", "int8", "w8a8", "w8a8"),
    ("int8", "int8", "w4a8", "w4a8"),
    ("int8", "convrot", "w4a8", "w4a8"),
    ("cache_dit", "svdq_g64", "w4a4", "w4a4"),
    ("nunchaku_lite", "svdq_g64", "w3a4", "w3a4"),
    ("humming", "w4a8_row", "w4a8", "w4a8"),
    ("humming", "w4a8_row", "w3a8", "w3a8"),
]


@pytest.mark.parametrize(("target", "profile", "bits", "runs_as"), EXACT, ids=lambda value: value)
def test_the_targets_arithmetic_is_the_packed_layers(target: str, profile: str, bits: str, runs_as: str) -> None:
    layer, x = packed_layer(profile, bits, columns=384, rows=128)
    exporter = load_leaf("export", target)
    layer.bias.data = layer.bias.to(torch.bfloat16).float()  # as it is stored
    fit = exporter.fit(layer)
    assert fit.reasons == ()
    assert fit.runs_as == runs_as
    y = exporter.output(exporter.tensors(layer), x[0])
    assert torch.equal(y, layer(x)[0])


def test_a_wider_file_pads_what_cache_dit_pads() -> None:
    layer, x = packed_layer("svdq_g64", "w4a4", columns=192, rows=96)
    exporter = load_leaf("export", "cache_dit", dtype="bfloat16", rank=16)
    layer.bias.data = layer.bias.to(torch.bfloat16).float()
    tensors = exporter.tensors(layer)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {
        "qweight": [128, 128], "wscales": [4, 128], "smooth_factor": [256], "smooth_factor_orig": [256],
        "proj_down": [256, 16], "proj_up": [128, 16], "bias": [128], "folded_weight": [96, 192],
    }  # fmt: skip
    assert torch.equal(exporter.output(tensors, x[0])[:, :96], layer(x)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_sums_are_rounded_at_every_step(dtype: torch.dtype) -> None:
    """One element at a time: q_x q_w, s_x s_w and each sum in half precision; a branch and the bias behind the groups."""
    name = str(dtype).removeprefix("torch.")
    layer, x = packed_layer("svdq_g64", "w4a4", columns=192, rows=6, scale_dtype=name)
    layer.form = replace(layer.form, branch_rank=2)
    generator = torch.Generator().manual_seed(0)
    layer.branch_down = torch.randn(2, 192, generator=generator).bfloat16()
    layer.branch_up = torch.randn(6, 2, generator=generator).bfloat16()
    form = svdq_layer.SvdqForm(dtype=name, rank=16)
    assert svdq_layer.weight_reasons(layer, dtype=name) == []
    found = svdq_layer.svdq_half_output(form.tensors(layer), x[0])

    def half(value: float) -> float:
        return float(torch.tensor(value, dtype=torch.float64).to(dtype))

    codes, row_codes = layer.integer_codes().tolist(), layer.input_codes(x).tolist()
    for m, n in ((0, 0), (3, 5), (31, 2)):
        y = 0.0
        for group in range(3):
            columns = range(64 * group, 64 * group + 64)
            row_scale = half(max(abs(float(x[0, m, k])) for k in columns) * float(torch.tensor(7.0).reciprocal()))
            total = sum(row_codes[m][k] * codes[n][k] for k in columns)
            y = half(y + half(total) * half(row_scale * float(layer.weight_scale[n, group])))
        hidden = [half(float(x[0, m].double() @ layer.branch_down[r].to(dtype).double())) for r in range(2)]
        y = half(y + sum(h * float(u) for h, u in zip(hidden, layer.branch_up[n].to(dtype), strict=True)))
        y = half(y + half(float(layer.bias[n])))
        assert float(found[m, n]) == pytest.approx(y, rel=2.0**-7 if dtype == torch.bfloat16 else 2.0**-10), (m, n)
    exact = svdq_layer.svdq_output(form.tensors(layer), x[0])
    assert 0 < (found - exact).norm() < (0.02 if dtype == torch.bfloat16 else 0.002) * exact.norm()


def test_nibbles_hold_the_even_column_low() -> None:
    codes = torch.tensor([[k % 15 - 7 for k in range(16)]], dtype=torch.int8)
    packed = pack_signed_nibbles(codes)
    derived = bytes((int(codes[0, 2 * j]) & 15) | (int(codes[0, 2 * j + 1]) & 15) << 4 for j in range(8))
    assert bytes(packed.view(torch.uint8)[0].tolist()) == derived == bytes.fromhex("a9cbed0f21436597")
    assert torch.equal(unpack_signed_nibbles(packed), codes)


def test_the_golden_comfy_layer() -> None:
    """One row of 64 columns: -7, -6, ... 7, -7, ... in 32 bytes, one scale, the marker."""
    layer, _ = packed_layer("convrot", "w4a4", columns=64, rows=1)
    codes = torch.tensor([[k % 15 - 7 for k in range(64)]], dtype=torch.int16)
    layer.codes.copy_(((codes[:, 0::2] + 8) | (codes[:, 1::2] + 8) << 4).to(torch.uint8))  # canonical: unsigned
    layer.weight_scale.fill_(0.5)
    tensors = load_leaf("export", "comfy").tensors(layer)
    golden = "a9cbed0f21436597badcfe10325476a9cbed0f21436597badcfe10325476a9cb"
    derived = bytes((int(a) & 15) | (int(b) & 15) << 4 for a, b in codes[0].reshape(-1, 2))
    assert bytes(tensors["weight"].view(torch.uint8)[0].tolist()) == derived
    assert derived.hex() == golden
    assert tensors["weight_scale"].tolist() == [0.5]
    assert bytes(tensors["comfy_quant"].tolist()) == (
        b'{"format": "convrot_w4a4", "convrot_groupsize": 64, "linear_dtype": "int4"}'
    )
    assert tensors["weight"].dtype == torch.int8
    assert tensors["weight_scale"].dtype == torch.float32
    assert tensors["bias"].dtype == torch.bfloat16


def test_the_golden_int8_layer() -> None:
    layer, _ = packed_layer("int8", "w8a8", columns=4, rows=2)
    layer.codes.copy_(torch.tensor([[1, 128, 255, 129], [127, 126, 130, 2]], dtype=torch.uint8))  # q + 128
    tensors = load_leaf("export", "int8").tensors(layer)
    assert tensors["weight"].tolist() == [[-127, 0, 127, 1], [-1, -2, 2, -126]]
    assert list(tensors["weight_scale"].shape) == [2, 1]
    assert bytes(tensors["comfy_quant"].tolist()) == b'{"format": "int8_tensorwise"}'
    turned, _ = packed_layer("convrot", "w4a8", columns=256, rows=2)
    assert read_marker(load_leaf("export", "int8").tensors(turned)["comfy_quant"]) == {
        "format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256,
    }  # fmt: skip


def derived_tiles(codes: Tensor) -> bytes:
    """A 128 x 64 tile: p, i, j, a, b, c from the slowest to the fastest; row 16 p + 8 a + i, column 32 b + 8 j + c."""
    nibbles = [
        int(codes[16 * p + 8 * a + i, 32 * b + 8 * j + c]) & 15
        for p in range(8) for i in range(8) for j in range(4) for a in range(2) for b in range(2) for c in range(8)
    ]  # fmt: skip
    return bytes(low | high << 4 for low, high in zip(nibbles[0::2], nibbles[1::2], strict=True))


def test_the_golden_tile_of_svdquant() -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-7, 8, (128, 128), generator=generator, dtype=torch.int8)
    packed = bytes(svdq_tiles.pack_weight(codes).view(torch.uint8).flatten().tolist())
    assert packed == derived_tiles(codes[:, :64]) + derived_tiles(codes[:, 64:])
    counting = torch.tensor([[(n + k) % 15 - 7 for k in range(128)] for n in range(128)], dtype=torch.int8)
    first = bytes(svdq_tiles.pack_weight(counting).view(torch.uint8).flatten()[:16].tolist())
    # Row 0, columns 0..7 are -7..0; columns 32..39 begin at 32 % 15 - 7 = -5; then row 8.
    assert first.hex() == "a9cbed0fcbed0f2121436597436597ba"
    scale = torch.arange(256.0).reshape(128, 2)
    order = [16 * t + 8 * u + 2 * v + w for t in range(8) for v in range(4) for u in range(2) for w in range(2)]
    assert svdq_tiles.pack_scale(scale).tolist() == scale.t()[:, order].tolist()


@pytest.mark.parametrize("name", ["weight", "scale", "vector", "down", "up"])
def test_tiles_are_unpacked(name: str) -> None:
    generator = torch.Generator().manual_seed(2)
    values = {
        "weight": torch.randint(-8, 8, (256, 384), generator=generator, dtype=torch.int8),
        "scale": torch.randn(256, 6, generator=generator),
        "vector": torch.randn(256, generator=generator),
        "down": torch.randn(32, 384, generator=generator),
        "up": torch.randn(256, 32, generator=generator),
    }
    packed = getattr(svdq_tiles, f"pack_{name}")(values[name])
    assert torch.equal(getattr(svdq_tiles, f"unpack_{name}")(packed), values[name])


def test_the_plain_weight_undoes_rotation_smoothing_and_branch() -> None:
    layer, x = packed_layer("convrot", "w4a8", columns=256, rows=8)
    four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    rotation = torch.kron(torch.kron(four, four), torch.kron(four, four))
    assert torch.allclose(plain_weight(layer), layer.dequantized_weight() @ rotation, atol=1e-6)
    error = (x[0] @ plain_weight(layer).t() + layer.bias - layer(x)[0]).norm() / layer(x)[0].norm()
    assert error < 0.02  # 8-bit inputs


def misfits(target: str, profile: str, bits: str, **changes: Any) -> tuple[str, ...]:
    layer, _ = packed_layer(profile, bits, columns=256, rows=128)
    return tuple(load_leaf("export", target, **changes).fit(layer).reasons)


@pytest.mark.parametrize(
    ("target", "profile", "bits", "reason"),
    [
        ("comfy", "paper", "w4a4", "weight with a zero point"),
        ("comfy", "paper", "w3a3", "inputs of 3 bits"),
        ("comfy", "int8", "w4a8", "weight not rotated"),
        ("comfy", "svdq_g64", "w4a4", "weight with a scale for every 64 columns"),
        ("int8", "convrot", "w4a4", "inputs of 4 bits"),
        ("int8", "paper", "w8a8", "ranges of inputs cut by learned factors"),
        ("int8", "w4a8_row", "w4a8", "inputs multiplied by 1 / scale, not divided by it"),
        ("humming", "int8", "w4a8", "inputs divided by the scale, not multiplied by 1 / scale"),
        ("humming", "int8", "w4a8", "weight scales in float32, not bfloat16"),
        ("humming", "convrot", "w4a8", "weight rotated by regular blocks of 256"),
        ("humming", "paper", "w4a8", "weight with a zero point"),
        ("torchao", "convrot", "w4a4", "weight rotated by regular blocks of 256"),
        ("sdnq", "convrot", "w4a4", "weight rotated by regular blocks of 256"),
        ("cache_dit", "convrot", "w4a4", "weight rotated by regular blocks of 256"),
        ("nunchaku_lite", "paper", "w4a4", "inputs without groups of 64 columns"),
    ],
)
def test_what_a_target_does_not_carry_is_said(target: str, profile: str, bits: str, reason: str) -> None:
    assert reason in misfits(target, profile, bits)


def test_half_precision_of_the_scales_is_the_targets() -> None:
    assert misfits("cache_dit", "svdq_g64", "w4a4") == ()
    assert "weight scales in bfloat16, not float16" in misfits("cache_dit", "svdq_g64", "w4a4", dtype="float16")


def test_weights_that_do_not_fit_are_quantized_again_with_little_error() -> None:
    layer, _ = packed_layer("paper", "w4a8", columns=256, rows=64)
    weight = plain_weight(layer)
    for target, bound in (("int8", 0.01), ("comfy", 0.2), ("cache_dit", 0.15)):
        exporter = load_leaf("export", target)
        assert exporter.fit(layer).weight
        unit = torch.eye(256) * math.sqrt(2)  # inputs that the quantizer holds exactly, rotated or not
        y = exporter.output(exporter.tensors(layer), unit)[:, :64] - layer.bias.bfloat16().float()
        assert (y.t() / math.sqrt(2) - weight).norm() / weight.norm() < bound, target


@pytest.mark.parametrize(
    ("target", "changes", "message"),
    [
        ("comfy", {"dtype": "int8"}, "export.dtype=int8 is not among null, float32, bfloat16, float16"),
        ("bf16", {"layout": "gguf"}, "export.layout=gguf is not among diffusers, original"),
        ("cache_dit", {"dtype": "float32"}, "export.dtype=float32 is not among bfloat16, float16"),
        ("cache_dit", {"rank": 8}, "export.rank=8 is no multiple of 16 from 0 on; use 16"),
        ("nunchaku_lite", {"rank": 0}, "export.rank=0 is no multiple of 16 from 16 on; use 16"),
    ],
)
def test_bad_values_of_a_targets_keys_are_refused(target: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_leaf("export", target, **changes)


def test_layers_that_no_form_of_the_format_holds_are_refused() -> None:
    layer, _ = packed_layer("int8", "w8a8", columns=96, rows=96)
    for target, message in (
        ("comfy", "no multiple of 64"),
        ("cache_dit", "no multiple of 64"),
        ("nunchaku_lite", "128"),
    ):
        with pytest.raises(UserError, match=message):
            load_leaf("export", target).fit(layer)
