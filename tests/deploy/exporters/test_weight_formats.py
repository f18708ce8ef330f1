"""Bytes of the formats of humming, torchao and SDNQ, derived here bit by bit, and their arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qvgen.config.leaves import load_leaf
from qvgen.deploy.exporters.bit_layout import dense_layout, pack_bits, unpack_bits
from qvgen.deploy.exporters.plain_weight import plain_weight
from qvgen.deploy.exporters.sdnq import LAYOUTS, dequantized
from qvgen.errors import UserError
from qvgen.layers.packed_linear import PackedLinear
from qvgen.quant.packing import pack_codes
from tests.deploy.exporters.packed_models import packed_layer


def with_codes(profile: str, bits: str, codes: Tensor, *, scale: float) -> PackedLinear:
    """A layer with the given unsigned codes [N, K] and one scale."""
    layer, _ = packed_layer(profile, bits, columns=codes.shape[1], rows=codes.shape[0])
    planes = pack_codes(codes.to(torch.uint8), bits=layer.profile.weight.bits)
    for mine, plane in zip(layer.planes, planes, strict=True):
        mine.copy_(plane)
    layer.weight_scale.fill_(scale)
    return layer


def stored(tensor: Tensor) -> bytes:
    """The bytes of a tensor in a file."""
    return bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())


def derived_words(codes: list[int], bits: int) -> bytes:
    """Codes one behind the other, the first one lowest, as one whole number of little-endian bytes."""
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    return number.to_bytes(len(codes) * bits // 8, "little")


@pytest.mark.parametrize(
    ("bits", "golden"),
    [
        (3, "d1583f1aeb4763fd68ac1f8d" + "ac1f8df5a3b17e34d68fc6fa"),
        (4, "21436587a9cbed1f32547698badcfe21" + "f2" * 16),
    ],
)
def test_the_golden_humming_layer(bits: int, golden: str) -> None:
    """Two rows of 32 columns, codes from 1 on as symmetric grids have them; three or four words a row."""
    if bits == 3:
        rows = [[k % 7 + 1 for k in range(32)], [(k + 3) % 7 + 1 for k in range(32)]]
    else:
        rows = [[k % 15 + 1 for k in range(32)], [2, 15] * 16]
    layer = with_codes("w4a8_row", f"w{bits}a8", torch.tensor(rows), scale=0.5)
    tensors = load_leaf("export", "humming").tensors(layer)
    assert stored(tensors["weight"]) == b"".join(derived_words(row, bits) for row in rows)
    assert tensors["weight"].dtype == torch.int32
    assert list(tensors["weight"].shape) == [2, bits]
    assert tensors["weight_scale"].tolist() == [[0.5], [0.5]]
    assert tensors["weight_scale"].dtype == tensors["bias"].dtype == torch.bfloat16
    assert stored(tensors["weight"]).hex() == golden


def test_humming_quantizes_inputs_as_the_profile_does_but_for_the_smallest_rows() -> None:
    """In float32 steps, one by one: s = max(max|x| / 127, 1e-30), q = rne(x (1 / s))."""
    layer, _ = packed_layer("w4a8_row", "w4a8", columns=256, rows=8)
    x = torch.randn(400, 256, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    exporter = load_leaf("export", "humming")
    codes, scale = exporter.scheme.input_codes(x, bits=8)
    top = x.abs().amax(-1, keepdim=True)
    assert torch.equal(scale, torch.maximum(top / torch.tensor(127.0), torch.tensor(1e-30)))
    assert torch.equal(codes, torch.round(x * (1 / scale)))
    assert torch.equal(codes, layer.input_codes(x.unsqueeze(0)).float())
    assert not torch.equal(codes, torch.round(x / scale))  # other runtimes divide, and get other codes
    tiny = x * 1e-9
    assert exporter.scheme.input_codes(tiny, bits=8)[0].abs().amax() == 127
    assert layer.input_codes(tiny.unsqueeze(0)).abs().amax() < 127  # scales of the packed layer end at 1e-8


def test_humming_keeps_each_layers_width() -> None:
    for bits in (2, 5, 8):
        layer, x = packed_layer("int8", f"w{bits}a8", columns=96, rows=16)
        exporter = load_leaf("export", "humming", dtype="float16")
        assert exporter.fit(layer).runs_as == f"w{bits}a8"
        tensors = exporter.tensors(layer)
        assert list(tensors["weight"].shape) == [16, 3 * bits]
        assert tensors["weight_scale"].dtype == torch.float16
        error = (exporter.output(tensors, x[0]) - layer(x)[0]).norm() / layer(x)[0].norm()
        assert error < 0.35 * 2.0 ** (3 - bits)
    odd, _ = packed_layer("int8", "w4a8", columns=40, rows=16)
    with pytest.raises(UserError, match="in_features=40 is no multiple of 32"):
        load_leaf("export", "humming").fit(odd)


SDNQ_PLACES = {
    2: ["0.0 0.1 1.0 1.1 2.0 2.1 3.0 3.1"],
    3: ["0.0 0.1 0.2 3.0 3.1 3.2 6.0 6.1", "1.0 1.1 1.2 4.0 4.1 4.2 7.0 7.1", "2.0 2.1 2.2 5.0 5.1 5.2 6.2 7.2"],
    4: ["0.0 0.1 0.2 0.3 1.0 1.1 1.2 1.3"],
    5: [
        "0.0 0.1 0.2 0.3 0.4 5.0 5.1 5.2", "1.0 1.1 1.2 1.3 1.4 6.0 6.1 6.2", "2.0 2.1 2.2 2.3 2.4 7.0 7.1 7.2",
        "3.0 3.1 3.2 3.3 3.4 5.3 5.4 7.4", "4.0 4.1 4.2 4.3 4.4 6.3 6.4 7.3",
    ],
    6: ["0.0 0.1 0.2 0.3 0.4 0.5 3.4 3.5", "1.0 1.1 1.2 1.3 1.4 1.5 3.2 3.3", "2.0 2.1 2.2 2.3 2.4 2.5 3.0 3.1"],
    7: [f"{j}.0 {j}.1 {j}.2 {j}.3 {j}.4 {j}.5 {j}.6 7.{6 - j}" for j in range(7)],
}  # fmt: skip


@pytest.mark.parametrize("bits", sorted(SDNQ_PLACES))
def test_layouts_of_bits_are_the_described_ones(bits: int) -> None:
    places = tuple(tuple(tuple(map(int, at.split("."))) for at in byte.split()) for byte in SDNQ_PLACES[bits])
    assert LAYOUTS[bits] == places
    for layout in (LAYOUTS[bits], dense_layout(bits)):
        codes = torch.randint(0, 2**bits, (8, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
        packed = pack_bits(codes, layout)
        assert packed.numel() * 8 == codes.numel() * bits
        assert torch.equal(unpack_bits(packed, layout).reshape(codes.shape), codes)


@pytest.mark.parametrize(
    ("profile", "bits", "golden"),
    [
        ("paper", "w3a3", "98e9fa98e9fa" + "00" * 6),
        ("paper", "w4a4", "10325476" + "98badcfe" + "00" * 8),
        ("w4a8_row", "w4a8", "21436587" + "a9cbed1f" + "f2" * 8),
    ],
)
def test_the_golden_sdnq_layer(profile: str, bits: str, golden: str) -> None:
    """Two rows of 16 columns; with a zero point z and the scale 1/4 a zero point of -z / 4 is stored."""
    rows = {
        "98e9fa98e9fa000000000000": [[0, 1, 2, 3, 5, 7, 6, 7] * 2, [0] * 16],
        "1032547698badcfe0000000000000000": [list(range(16)), [0] * 16],
        "21436587a9cbed1ff2f2f2f2f2f2f2f2": [[k % 15 + 1 for k in range(16)], [2, 15] * 8],
    }[golden]
    layer = with_codes(profile, bits, torch.tensor(rows), scale=0.25)
    if layer.weight_zero_point is not None:
        layer.weight_zero_point.copy_(torch.tensor([3, 0], dtype=torch.uint8))
    tensors = load_leaf("export", "sdnq").tensors(layer)
    width = int(bits[1])
    places = [[tuple(map(int, at.split("."))) for at in byte.split()] for byte in SDNQ_PLACES[width]]
    flat, size = [code for row in rows for code in row], 8 if width == 3 else 2
    derived = bytes(
        sum(((flat[start + code] >> bit) & 1) << place for place, (code, bit) in enumerate(byte))
        for start in range(0, 32, size)
        for byte in places
    )
    assert stored(tensors["weight"]) == derived
    assert stored(tensors["weight"]).hex() == golden
    assert tensors["weight"].dtype == torch.uint8
    assert list(tensors["weight"].shape) == ([4, 3] if width == 3 else [16])
    assert tensors["scale"].tolist() == [[0.25], [0.25]]
    if layer.weight_zero_point is not None:
        assert tensors["zero_point"].tolist() == [[-0.75], [0.0]]
    assert torch.equal(dequantized(tensors, columns=16), layer.dequantized_weight())


def test_the_golden_torchao_layer() -> None:
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]])
    layer = with_codes("paper", "w3a3", codes, scale=0.25)
    layer.weight_zero_point.fill_(5)
    tensors = load_leaf("export", "torchao").tensors(layer)
    assert tensors["_weight_qdata"].tolist() == [[-4, -3, -2, -1, 0, 1, 2, 3]]
    assert tensors["_weight_zero_point"].tolist() == [[1]]
    assert tensors["_weight_scale"].tolist() == [[0.25]]
    kinds = [tensors[f"_weight_{part}"].dtype for part in ("qdata", "zero_point", "scale")]
    assert kinds == [torch.int8, torch.int8, torch.float32]
    symmetric = with_codes("w4a8_row", "w4a8", torch.tensor([[1, 8, 15, 9]]), scale=0.5)
    tensors = load_leaf("export", "torchao").tensors(symmetric)
    assert tensors["_weight_qdata"].tolist() == [[-7, 0, 7, 1]]
    assert tensors["_weight_zero_point"].tolist() == [[0]]


@pytest.mark.parametrize("target", ["torchao", "sdnq"])
@pytest.mark.parametrize(
    ("profile", "bits"), [("paper", "w3a3"), ("paper", "w8a8"), ("w4a8_row", "w3a8"), ("svdq_g64", "w4a4")]
)
def test_targets_that_dequantize_hold_the_weights(target: str, profile: str, bits: str) -> None:
    layer, x = packed_layer(profile, bits, columns=128, rows=16)
    exporter = load_leaf("export", target, dtype=None)
    fit = exporter.fit(layer)
    assert (fit.reasons, fit.quantizes_inputs) == ((), False)
    y = exporter.output(exporter.tensors(layer), x[0])
    wanted = x[0] @ layer.dequantized_weight().t() + layer.bias
    if target == "torchao" or profile != "paper":
        assert torch.equal(y, wanted)
    assert (y - wanted).norm() / wanted.norm() < 1e-6  # one more rounding of float32, of a zero point times a scale


@pytest.mark.parametrize("target", ["torchao", "sdnq"])
def test_a_weight_in_other_coordinates_is_quantized_again_with_its_own_bits(target: str) -> None:
    layer, x = packed_layer("convrot", "w4a8", columns=256, rows=16)
    exporter = load_leaf("export", target, dtype=None)
    assert exporter.fit(layer).runs_as == "w4"
    wanted = x[0] @ plain_weight(layer).t() + layer.bias
    y = exporter.output(exporter.tensors(layer), x[0])
    assert 0 < (y - wanted).norm() / (wanted - layer.bias).norm() < 0.2


@pytest.mark.parametrize(("target", "fits"), [("sdnq", True), ("torchao", False)])
def test_real_zero_points_are_carried_where_the_format_has_them(target: str, fits: bool) -> None:
    layer, x = packed_layer("paper", "w4a4", columns=64, rows=16, weight_zero_point="real")
    exporter = load_leaf("export", target, dtype=None)
    assert (exporter.fit(layer).weight == ()) is fits
    wanted = x[0] @ layer.dequantized_weight().t() + layer.bias
    error = (exporter.output(exporter.tensors(layer), x[0]) - wanted).norm() / wanted.norm()
    assert error < (1e-6 if fits else 0.2)


@pytest.mark.parametrize("bits", ["w3a8", "w4a8", "w8a8"])
def test_sdnq_s_own_products_quantize_inputs_as_the_profile_does(bits: str) -> None:
    layer, x = packed_layer("int8", bits, columns=64, rows=48)
    exporter = load_leaf("export", "sdnq", dtype=None, quantized_inputs=True)
    assert (exporter.fit(layer).reasons, exporter.fit(layer).runs_as) == ((), bits)
    tensors = exporter.tensors(layer)
    assert torch.equal(exporter.output(tensors, x[0]), layer(x)[0])
    assert torch.equal(dequantized(tensors, columns=64), layer.dequantized_weight())
    if bits == "w8a8":  # stored the other way round
        assert list(tensors["weight"].shape) == [64, 48]
        assert list(tensors["scale"].shape) == [1, 48]
        assert torch.equal(tensors["weight"].t(), layer.integer_codes())


@pytest.mark.parametrize(
    ("profile", "bits", "reason"),
    [
        ("paper", "w4a8", "weight with a zero point"),
        ("paper", "w4a8", "ranges of inputs cut by learned factors"),
        ("int8", "w4a4", "inputs of 4 bits"),
        ("w4a8_row", "w4a8", "inputs multiplied by 1 / scale, not divided by it"),
    ],
)
def test_other_inputs_than_sdnq_s_products_have_are_said(profile: str, bits: str, reason: str) -> None:
    layer, _ = packed_layer(profile, bits, columns=64, rows=32)
    assert reason in load_leaf("export", "sdnq", quantized_inputs=True).fit(layer).reasons


def test_sdnq_multiplies_no_small_or_odd_weights() -> None:
    exporter = load_leaf("export", "sdnq", quantized_inputs=True)
    for columns, rows in ((16, 64), (72, 64)):
        layer, _ = packed_layer("int8", "w4a8", columns=columns, rows=rows)
        with pytest.raises(UserError, match="write export.quantized_inputs=false"):
            exporter.fit(layer)


def test_sdnq_needs_whole_groups_of_codes() -> None:
    layer, _ = packed_layer("int8", "w4a8", columns=4, rows=1)
    with pytest.raises(UserError, match="its 1 x 4 codes do not fill groups of 8"):
        load_leaf("export", "sdnq").fit(layer)


@pytest.mark.parametrize(("target", "dtype"), [("humming", "float32"), ("torchao", "int8"), ("sdnq", "float8")])
def test_precisions_that_a_target_does_not_have_are_refused(target: str, dtype: Any) -> None:
    with pytest.raises(UserError, match=f"export.dtype={dtype} is not among"):
        load_leaf("export", target, dtype=dtype)
