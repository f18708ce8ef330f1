"""kernel=dequantize: the reference's codes, outputs within the stated distance of the reference's, planes that stay packed.

The distance (kernels/README.md): eps of x's dtype times |product| + |output|, and times the sum of the magnitudes where a
side has groups or a real zero point; and what a float32 sum loses.
"""

import re
from dataclasses import replace

import pytest
import torch

from qvgen_kernels import LinearSpec, LinearTensors, available_kernels, dequantize, get_backend, prepack, resolve_kernel
from qvgen_kernels.reference import finish, quantize_activations
from qvgen_kernels.weight import CanonicalWeight
from tests.kernels.cpu_cases import Case, Seeded, draw_case
from tests.kernels.layer import DTYPES, make_layer, make_rows

BACKEND = get_backend("dequantize")


def run(case, *, spec=None, tensors=None):
    spec, layer = spec or case.layer.spec, case.layer
    weight = BACKEND.prepack(layer.planes, scale=layer.scale, zero_point=layer.zero_point, spec=layer.spec)
    return BACKEND.linear(case.x, weight, tensors=case.tensors if tensors is None else tensors, spec=spec)


def distance(case, expected):
    """How far an output may be from the reference's, [M, N]."""
    spec, layer = case.layer.spec, case.layer
    operand, scale, _ = quantize_activations(case.x, spec=spec, tensors=case.tensors)
    rows = (operand * scale.unsqueeze(-1)).flatten(1).double()
    zeros = (
        layer.zero_point
        if layer.zero_point is not None
        else torch.full_like(layer.scale, 2.0 ** (spec.weight_bits - 1))
    )
    scales, zeros = (value.reshape(len(value), -1, 1).double() for value in (layer.scale, zeros))
    weight = ((layer.codes.double().unflatten(1, (scales.shape[1], -1)) - zeros) * scales).flatten(1)
    magnitudes, product = rows.abs() @ weight.abs().t(), (rows @ weight.t()).abs()
    eps = torch.finfo(case.x.dtype).eps
    rounded = spec.weight_group_size or spec.activation_group_size or spec.weight_zero_point == "real"
    allowed = eps * (product + expected.double().abs()) + (eps if rounded else 0) * magnitudes
    allowed += spec.in_features * 2.0**-24 * magnitudes
    if spec.branch_rank:
        down, up = (value.to(case.x.dtype).double() for value in (case.tensors.branch_down, case.tensors.branch_up))
        allowed += (
            2 * eps * ((case.x.double() @ down.t()).abs() @ up.abs().t() + (rows.abs() @ down.abs().t()) @ up.abs().t())
        )
    return allowed + torch.finfo(case.x.dtype).tiny


@pytest.mark.parametrize("seed", range(60))
def test_outputs_are_within_the_stated_distance(seed):
    case = draw_case(Seeded(seed), columns=(1, 160), rows=(1, 40), seed=seed)
    spec = replace(case.layer.spec, function="none")
    plain = case.tensors._replace(gate=None, residual=None)
    expected = case.plain()
    found = run(case, spec=spec, tensors=plain)
    assert found.dtype == expected.dtype
    assert found.is_contiguous()
    finite = expected.isfinite().all(1)
    assert torch.equal(found.isnan().any(1), expected.isnan().any(1))  # and no other row
    assert ((found - expected).double().abs() <= distance(case, expected))[finite].all()
    # function, gate and residual are those of torch's operators on these outputs
    whole = run(case)
    assert torch.equal(whole.nan_to_num(), finish(found, tensors=case.tensors, spec=case.layer.spec).nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_whole_operands_give_the_accumulators(dtype, bits):
    """With scales of 1 the outputs are the accumulators, rounded to x's dtype once: no operand was rounded."""
    layer = make_layer(
        in_features=250, out_features=19, weight_bits=bits, activation_bits=bits, activation_range="static"
    )
    layer.scale.fill_(1.0)
    x = make_rows(11, 250)
    ones, zeros = torch.ones(11), torch.full((11,), 2.0)
    tensors = LinearTensors(row_scale=ones, row_zero_point=zeros)
    # float16 outputs hold 65504 at most
    tensors = tensors if dtype != torch.float16 else tensors._replace(row_scale=ones * 2.0**-10)
    x = (x * tensors.row_scale[:, None]).to(dtype)
    case = Case(layer, x, tensors)
    operand, _, _ = quantize_activations(x, spec=layer.spec, tensors=tensors)
    exact = operand.flatten(1) @ (layer.codes.float() - layer.zero_point.float()[:, None]).t()
    assert exact.abs().max() > 64
    assert torch.equal(run(case), (exact * tensors.row_scale[:, None]).to(dtype))


def test_rows_and_weights_in_blocks_are_the_whole(monkeypatch):
    layer = make_layer(
        in_features=40, out_features=30, weight_bits=3, activation_bits=4, function="gelu_tanh", branch_rank=2
    )
    x, few = make_rows(24, 40), torch.Generator().manual_seed(0)
    clips = torch.rand(24, generator=few) * 0.2 + 0.8
    tensors = LinearTensors(
        bias=layer.bias, clip_low=clips, clip_high=clips.flip(0), gate=torch.randn(3, 30, generator=few),
        residual=torch.randn(24, 30, generator=few), branch_down=torch.randn(2, 40, generator=few),
        branch_up=torch.randn(30, 2, generator=few),
    )  # fmt: skip
    whole = run(Case(layer, x, tensors))
    monkeypatch.setattr(dequantize, "BLOCK", 200)  # five rows at a time, and a sample has eight
    assert torch.allclose(run(Case(layer, x, tensors)), whole, rtol=1e-5, atol=1e-4)
    assert torch.allclose(
        whole, get_backend("reference").linear(x, layer.weight, tensors=tensors, spec=layer.spec), rtol=1e-5, atol=1e-3
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["integer", "real", "none"])
def test_planes_stay_packed_and_are_not_copied(bits, kind):
    layers = [
        make_layer(seed=seed, weight_bits=bits, weight_zero_point=kind, out_features=7 + seed) for seed in range(2)
    ]
    parts = [CanonicalWeight(layer.planes, layer.scale, layer.zero_point) for layer in layers]
    spec = replace(layers[0].spec, out_features=15)
    weight = BACKEND.prepack_parts(parts, spec=spec)
    theirs = [
        tensor for layer in layers for tensor in (*layer.planes, layer.scale, layer.zero_point) if tensor is not None
    ]
    assert [tensor.data_ptr() for tensor in weight] == [tensor.data_ptr() for tensor in theirs]
    x = make_rows(5, 24)
    alone = [run(Case(layer, x)) for layer in layers]
    merged = BACKEND.linear(x, weight, tensors=LinearTensors(), spec=spec)
    assert torch.allclose(merged, torch.cat(alone, 1), rtol=1e-5, atol=1e-4)


def test_an_accelerator_prefers_it_to_the_reference_and_the_cpu_never_takes_it():
    spec = LinearSpec(in_features=8, out_features=8, weight_bits=4, activation_bits=4)
    assert available_kernels(spec)[-1] == "dequantize"
    for device in ("cuda", "mps", "xpu"):
        names = available_kernels(spec, device=device)
        assert "dequantize" in names
        assert names.index("dequantize") < names.index("reference") if "reference" in names else device != "cuda"
    assert resolve_kernel("auto", spec, device="mps").name == "dequantize"
    assert resolve_kernel("dequantize", spec).name == "dequantize"
    with pytest.raises(RuntimeError, match="it multiplies in float64, which mps does not have; use kernel=auto or"):
        resolve_kernel("reference", spec, device="mps")


def test_no_rows_and_other_weights():
    layer = make_layer()
    assert run(Case(layer, torch.empty(0, 24))).shape == (0, 7)
    weight = prepack(layer.planes, scale=layer.scale, zero_point=layer.zero_point, spec=layer.spec, kernel="dequantize")
    wrong = [weight[0], weight[1], weight[2].bfloat16(), *weight[3:]]
    for other, spec in ((wrong, layer.spec), (weight, replace(layer.spec, out_features=8)), (weight[:2], layer.spec)):
        with pytest.raises(ValueError, match=re.escape(f"what prepack returned for [{spec.out_features}, 24]")):
            BACKEND.linear(torch.ones(2, 24), other, tensors=LinearTensors(), spec=spec)
