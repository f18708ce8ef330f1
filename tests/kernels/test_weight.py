"""Checks and unpacking of canonical weights: unpacking equals qvgen's own packing, damage is named."""

import pytest
import torch

from qvgen.quant.packing import pack_codes
from qvgen_kernels import LinearSpec, prepack
from qvgen_kernels.weight import plane_shapes, unpack_planes
from tests.kernels.layer import make_layer


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 7, 8, 9, 17, 64])
def test_unpacking_inverts_the_canonical_packing(bits, columns):
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(0, 2**bits, (5, columns), generator=generator, dtype=torch.uint8)
    spec = LinearSpec(in_features=columns, out_features=5, weight_bits=bits, activation_bits=4)
    planes = pack_codes(codes, bits=bits)
    assert [tuple(plane.shape) for plane in planes] == plane_shapes(spec)
    assert torch.equal(unpack_planes(planes, spec=spec), codes)


@pytest.mark.parametrize("kind", ["integer", "real", "none"])
@pytest.mark.parametrize("bits", [2, 7, 8])
@pytest.mark.parametrize("group", [0, 8])
def test_prepacked_operand_is_code_minus_zero_point(kind, bits, group):
    layer = make_layer(weight_bits=bits, weight_zero_point=kind, weight_group_size=group)
    expected = layer.codes.int()
    if kind == "none":
        expected = expected - 2 ** (bits - 1)
    if kind == "integer":
        zero_point = layer.zero_point.int().reshape(7, -1)
        expected = expected - zero_point.repeat_interleave(24 // zero_point.shape[1], 1)
    assert torch.equal(layer.weight[0].int(), expected)
    assert torch.equal(layer.weight[1], layer.scale.reshape(7, -1))
    assert len(layer.weight) == (3 if kind == "real" else 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"planes": lambda v: v[:1]}, "3-bit weights need"),
        ({"planes": lambda v: (v[0][:, :-1], v[1])}, r"\(7, 6\)"),
        ({"planes": lambda v: (v[0].int(), v[1])}, r"torch\.int32"),
        ({"scale": lambda v: v[:-1]}, r"weight scale is torch\.float32 \[6\]"),
        ({"scale": lambda v: v.bfloat16()}, r"weight scale is torch\.bfloat16"),
        ({"scale": lambda v: v.unsqueeze(1)}, r"\[7, 1\]"),
        ({"scale": lambda v: v * 0}, "not finite and positive"),
        ({"scale": lambda v: v * float("nan")}, "not finite and positive"),
        ({"zero_point": lambda v: None}, "zero_point is missing"),
        ({"zero_point": lambda v: v.float()}, r"needs torch\.uint8"),
        ({"zero_point": lambda v: v * 0 + 8}, "zero_point 8 is above the largest code 7"),
    ],
)
def test_damaged_tensors_are_named(change, message):
    layer = make_layer()
    given = {"planes": layer.planes, "scale": layer.scale, "zero_point": layer.zero_point}
    given |= {name: damage(given[name]) for name, damage in change.items()}
    with pytest.raises(ValueError, match=message):
        prepack(given.pop("planes"), **given, spec=layer.spec, kernel="reference")


def test_more_damage_is_named():
    layer = make_layer(weight_zero_point="none")
    zero_point = torch.zeros(7, dtype=torch.uint8)
    with pytest.raises(ValueError, match="symmetric"):
        prepack(layer.planes, scale=layer.scale, zero_point=zero_point, spec=layer.spec, kernel="reference")
    layer = make_layer(weight_zero_point="real")
    zero_point = layer.zero_point * float("inf")
    with pytest.raises(ValueError, match="zero_point has values that are not finite"):
        prepack(layer.planes, scale=layer.scale, zero_point=zero_point, spec=layer.spec, kernel="reference")
    layer = make_layer(weight_bits=5)
    planes = [layer.planes[0] | 32]
    with pytest.raises(ValueError, match="does not fit into 5 bits"):
        prepack(planes, scale=layer.scale, zero_point=layer.zero_point, spec=layer.spec, kernel="reference")
