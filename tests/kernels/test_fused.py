"""Merged layers against their parts: the same bits."""

import pytest
import torch

from qvgen_kernels import LinearTensors, available_kernels, get_backend, packed_linear
from qvgen_kernels.fused import Canonical, merge_linears
from tests.kernels.layer import make_layer, make_rows

KERNELS = available_kernels(make_layer().spec)


def canonical(layer):
    return Canonical(layer.planes, layer.scale, layer.zero_point, layer.bias, layer.spec)


@pytest.mark.parametrize("options", [{}, {"weight_group_size": 8}, {"weight_zero_point": "none"}])
def test_merged_layers_give_the_bits_of_their_parts(options):
    layers = [make_layer(out_features=n, seed=n, rotation=8, **options) for n in (7, 32, 20)]
    merged = merge_linears([canonical(layer) for layer in layers])
    x = make_rows(9, 24, dtype=torch.bfloat16)
    for name in KERNELS:
        weight = get_backend(name).prepack(
            merged.planes, scale=merged.scale, zero_point=merged.zero_point, spec=merged.spec
        )
        y = packed_linear(x, weight=weight, tensors=LinearTensors(merged.bias), spec=merged.spec, kernel=name)
        for part, layer in zip(y.split([7, 32, 20], -1), layers, strict=True):
            assert torch.equal(part, layer(x))


def test_layers_that_differ_are_not_merged():
    with pytest.raises(ValueError, match="differ in more than out_features"):
        merge_linears([canonical(make_layer()), canonical(make_layer(activation_bits=4))])
    with pytest.raises(ValueError, match="branch_rank=2"):
        merge_linears([canonical(make_layer(branch_rank=2))])
    with pytest.raises(ValueError, match="some of the layers have a bias"):
        merge_linears([canonical(make_layer()), canonical(make_layer())._replace(bias=None)])
