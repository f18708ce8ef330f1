"""One suite over every kernel backend that runs here, ours and those of installed packages, against the exact reference.

Integer sums are exact, so that outputs differ by the roundings of the float32 epilogue alone: fewer than ten, each of 2^-24
of the largest number on the way. The reference itself is held to float64 NumPy by tests/kernels/test_reference.py.
"""

from __future__ import annotations

import pytest
import torch

from qvgen_kernels import LinearTensors, get_backend, kernel_names, packed_linear
from tests.kernels.layer import Layer, make_layer

DEVICE = torch.device("cpu")
NAMES = [name for name in kernel_names() if get_backend(name).refusal(make_layer().spec, device=DEVICE) is None]
KINDS = {
    "three bits": {},
    "signed": {"weight_bits": 4, "activation_bits": 8, "weight_zero_point": "none"},
    "groups": {"in_features": 128, "weight_group_size": 64, "activation_group_size": 64, "weight_bits": 4},
    "rotated": {"in_features": 96, "rotation": 16, "weight_bits": 6, "activation_bits": 6},
}  # fmt: skip

each = pytest.mark.parametrize("kind", KINDS)
every = pytest.mark.parametrize("name", NAMES)


def make_rows(count: int, columns: int) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(3))


def run(name: str, layer: Layer, x: torch.Tensor) -> torch.Tensor:
    weight = get_backend(name).prepack(layer.planes, scale=layer.scale, zero_point=layer.zero_point, spec=layer.spec)
    return packed_linear(x, weight=weight, tensors=LinearTensors(bias=layer.bias), spec=layer.spec, kernel=name)


def test_the_exact_reference_is_among_them() -> None:
    assert "reference" in NAMES


@every
@each
def test_outputs_are_the_exact_ones(name: str, kind: str) -> None:
    layer = make_layer(**KINDS[kind])
    if get_backend(name).refusal(layer.spec, device=DEVICE) is not None:
        pytest.skip(f"{name} refuses {kind}")
    x = make_rows(130, layer.spec.in_features)
    expected = layer(x)
    found = run(name, layer, x)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@every
@each
def test_a_row_is_by_itself_and_calls_agree(name: str, kind: str) -> None:
    layer = make_layer(**KINDS[kind])
    if get_backend(name).refusal(layer.spec, device=DEVICE) is not None:
        pytest.skip(f"{name} refuses {kind}")
    x = make_rows(70, layer.spec.in_features)
    before = run(name, layer, x)
    x[5] = 100.0
    others = torch.arange(len(x)) != 5
    after = run(name, layer, x)
    assert torch.equal(after[others], before[others])
    assert not torch.equal(after[5], before[5])
    assert torch.equal(run(name, layer, x), after)
    assert run(name, layer, x[:0]).shape == (0, layer.spec.out_features)
