"""The fake-quantized layer: golden values, isolation of tokens and channels, Phi, rotation, types and shapes.

Its arithmetic and gradients are held to the float64 oracle in test_layer_oracle.py.
"""

import pytest
import torch
from torch import nn

from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.fake_quant_product import rotated
from qvgen.layers.noise_band import NoiseBand
from qvgen.lowrank.decay import DecaySchedule
from qvgen.quant.affine import choose_qparams
from tests import oracles
from tests.layers.model import TIMESTEPS, make_layer, make_rows
from tests.profiles import COLUMNS, PROFILES, make_profile

FACTORED = [name for name in PROFILES if make_profile(name).weight.granularity == "per_channel"]
EXACT = [name for name in FACTORED if make_profile(name).weight.zero_point != "real"]
"""Profiles whose products are sums of whole numbers: the same bits whatever the order of summation."""


def test_golden_values():
    """W = [-1, -0.5, 0, 0.5, 1] on 3 bits (s = 1/2, z = 3), x = [-1, 0, 0.4, 1.2, 2.5], no clipping to speak of.

    Codes of x: 0 2 3 4 7 with s = 1/2, z = 2. (-2)(-2) + 0 + 0 + 2*1 + 5*2 = 16, times 1/4, plus the bias 0.25.
    """
    linear = nn.Linear(5, 1)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[-1.0, -0.5, 0.0, 0.5, 1.0]]))
        linear.bias.fill_(0.25)
    layer = FakeQuantLinear(linear, profile=make_profile("paper"), noise_band=NoiseBand(2))
    layer.weight_quantizer.start_from_(torch.tensor([[0.5]]), torch.tensor([[3.0]]))
    with torch.no_grad():
        layer.activation_quantizer.clip_low.fill_(60.0)  # sigmoid = 1 in float32
        layer.activation_quantizer.clip_high.fill_(60.0)
    layer.noise_band.set_timestep(torch.tensor(0))
    y = layer(torch.tensor([[-1.0, 0.0, 0.4, 1.2, 2.5]]))
    assert y.tolist() == [[4.25]]
    y.sum().backward()
    # dW = s_x (q_x - z_x) inside the range; s_w = 1/2: codes 1..5 are all inside.
    assert layer.weight.grad.tolist() == [[-1.0, 0.0, 0.5, 1.0, 2.5]]
    assert layer.bias.grad.tolist() == [1.0]


# --------------------------------------------------------------------------- isolation


@pytest.mark.parametrize("name", EXACT)
def test_tokens_and_samples_do_not_meet(name):
    """A row alone == in its batch == beside a disturbed token, bitwise, in the output and in dx."""
    layer, x = make_layer(name, seed=1), make_rows()
    layer.noise_band.set_timestep(TIMESTEPS)
    with torch.no_grad():
        y = layer(x)
        for value in (0.0, 1e20, -3.0):
            disturbed = x.clone()
            disturbed[1, 2] = value
            others = torch.ones(3, 4, dtype=torch.bool)
            others[1, 2] = False
            assert torch.equal(layer(disturbed)[others], y[others])
        for sample in range(3):
            layer.noise_band.set_timestep(TIMESTEPS[sample])
            assert torch.equal(layer(x[sample : sample + 1])[0], y[sample])
            for token in range(4):
                assert torch.equal(layer(x[sample, token][None])[0], y[sample, token])


@pytest.mark.parametrize("name", PROFILES)
def test_clip_gradients_go_to_the_samples_own_band(name):
    """Of a batch with mixed timesteps: each band gets what its sample alone gives it, other bands get nothing."""
    layer, x = make_layer(name, phi_rank=2, seed=2), make_rows()
    grad = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(3))
    quantizer = layer.activation_quantizer
    layer.noise_band.set_timestep(TIMESTEPS)
    layer(x).backward(grad)
    together = {key: value.grad.clone() for key, value in quantizer.named_parameters()}
    if not layer.profile.activation.clip:
        assert together == {}
        return
    assert together["clip_high"].nonzero().flatten().tolist() == [0, 2, 4]
    for sample, band in enumerate((0, 4, 2)):
        quantizer.zero_grad()
        layer.noise_band.set_timestep(TIMESTEPS[sample])
        layer(x[sample][None]).backward(grad[sample][None])
        for key, value in quantizer.named_parameters():
            assert value.grad.nonzero().flatten().tolist() in ([band], [])
            # The product by the weight may be summed in another order: 6 terms in float32, then 128 per token.
            torch.testing.assert_close(value.grad[band], together[key][band], rtol=1e-4, atol=1e-4)


def test_a_dead_or_huge_channel_spoils_nothing():
    layer, x = make_layer("paper", seed=3), make_rows()
    layer.noise_band.set_timestep(TIMESTEPS)
    before = layer(x)
    for value in (0.0, 0.3, 1e20):
        with torch.no_grad():
            layer.weight[2] = value
            scale, zero = choose_qparams(layer.weight, grid=layer.profile.weight)
            layer.weight_quantizer.scale[2], layer.weight_quantizer.zero_point[2] = scale[2], zero[2]
        y = layer(x)
        y.sum().backward()
        assert y.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
        assert torch.equal(y[..., [0, 1, 3, 4, 5]], before[..., [0, 1, 3, 4, 5]])


# --------------------------------------------------------------------------- Phi


@pytest.mark.parametrize("name", PROFILES)
def test_phi_without_rank_is_no_phi(name):
    layer, x = make_layer(name, phi_rank=4, seed=4), make_rows()
    plain = make_layer(name, seed=4)
    layer.noise_band.set_timestep(TIMESTEPS)
    plain.noise_band.set_timestep(TIMESTEPS)
    assert not torch.equal(layer(x), plain(x))
    layer.phi.suspended = True
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer.effective_weight(), plain.effective_weight())
    layer.phi.suspended = False
    layer.phi.advance_(DecaySchedule(ranks=(4,), num_steps=4, tail_share=0.1).at(2))  # u = 0, still allocated
    # What + 0 / s_w is What: adding a zero changes no value.
    assert torch.equal(layer(x), plain(x))
    layer.phi.advance_(DecaySchedule(ranks=(4,), num_steps=4, tail_share=0.1).at(3))
    assert layer.phi.rank == 0
    y = layer(x)
    assert torch.equal(y, plain(x))
    y.sum().backward()
    assert layer.phi.left.grad is None


@pytest.mark.parametrize("name", PROFILES)
def test_phi_starts_from_what_the_grid_leaves_over(name):
    layer = make_layer(name, phi_rank=4, seed=5)
    residual = (layer.weight - layer.quantized_weight()).double()
    left = (layer.weight - layer.effective_weight()).double()
    best = oracles.best_rank_error(residual.detach().numpy(), 4)
    assert left.square().sum().item() <= 1.01 * best + 1e-9  # truncated_svd's bound
    assert left.square().sum() < residual.square().sum()


# --------------------------------------------------------------------------- rotation, types, shapes


def test_rotation_keeps_the_product():
    """In full precision x H (W H)^T is x W^T; and the rotated layer at 8 bits is near the plain Linear."""
    linear = nn.Linear(COLUMNS, 6)
    layer = FakeQuantLinear(
        linear, profile=make_profile("convrot", weight_bits=8, activation_bits=8), noise_band=NoiseBand(1)
    )
    x = make_rows()
    product = rotated(x, layer.profile).double() @ layer.weight.detach().double().T
    exact = x.double() @ linear.weight.detach().double().T
    # 7 roundings of 2^-24 on either side of 128 products.
    size = x.double().norm(dim=-1, keepdim=True) * linear.weight.detach().double().norm(dim=-1)
    assert ((product - exact).abs() <= 16 * 2.0**-24 * size).all()
    scale, zero = choose_qparams(layer.weight.detach(), grid=layer.profile.weight)
    layer.weight_quantizer.start_from_(scale, zero)
    layer.noise_band.set_timestep(torch.tensor(0))
    # Errors of at most s/2 on either side, uncorrelated: 3 max / (254 sqrt(12)) of each vector's norm is about 1 %.
    assert (layer(x) - linear(x)).norm() <= 0.02 * (linear(x) - linear.bias).norm()


@pytest.mark.parametrize("name", FACTORED)
@pytest.mark.parametrize("phi_rank", [0, 4])
def test_bf16_autocast_stays_near_float32(name, phi_rank):
    """Codes are exact in bfloat16; what is rounded is What's Phi (or real zero point), the product, and the output."""
    layer, x = make_layer(name, phi_rank=phi_rank, seed=6), make_rows()
    layer.noise_band.set_timestep(TIMESTEPS)
    y = layer(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(8))
    y.backward(grad)
    full = {key: value.grad for key, value in layer.named_parameters()}
    layer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16
    assert y.dtype == torch.float32
    size = x.norm(dim=-1, keepdim=True) * layer.effective_weight().norm(dim=-1) + layer.bias.abs()
    # Three roundings of 2^-9 each (operand, product, output), of the sum of magnitudes at most.
    assert ((low.float() - y).abs() <= 3 * 2.0**-9 * size).all()
    low.backward(grad.bfloat16())
    for key, value in layer.named_parameters():
        assert value.grad.dtype == torch.float32
        # Codes and masks are those of float32; a few bfloat16 roundings of each term, 2^-9, averaging out.
        assert (value.grad - full[key]).norm() <= 0.02 * full[key].norm(), key


def test_the_quantizer_ignores_autocast():
    """Codes under autocast are those of float32: without Phi only the product's and the output's rounding differ."""
    layer, x = make_layer("paper", bias=False, seed=7), make_rows()
    layer.noise_band.set_timestep(TIMESTEPS)
    y = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x).float()
    assert ((low - y).abs() <= 2.0**-8 * y.abs() + 1e-6).all()  # two relative roundings of 2^-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_give_half_precision_outputs(dtype):
    layer, x = make_layer("paper", phi_rank=2, seed=8), make_rows().to(dtype).requires_grad_()
    layer.noise_band.set_timestep(TIMESTEPS)
    y = layer(x)
    y.float().sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert layer.weight.grad.dtype == torch.float32
    # As under autocast, on the same numbers.
    reference = layer(x.detach().float())
    size = x.detach().float().norm(dim=-1, keepdim=True) * layer.effective_weight().norm(dim=-1) + layer.bias.abs()
    assert ((y.float() - reference).abs() <= 3 * 2.0**-9 * size).all()


def test_any_layout_of_rows():
    layer, x = make_layer("paper", seed=9), make_rows(tokens=6)
    layer.noise_band.set_timestep(TIMESTEPS)
    y = layer(x)
    assert torch.equal(layer(x.reshape(3, 2, 3, COLUMNS)).reshape(y.shape), y)
    assert torch.equal(layer(x.reshape(18, COLUMNS)).reshape(y.shape), y)
    assert torch.equal(layer(x.transpose(1, 2).contiguous().transpose(1, 2)), y)
    assert layer(x[:, :0]).shape == (3, 0, 6)
    assert layer(x[:0]).shape == (0, 6, 6)


def test_no_bias_and_no_gradient_for_what_is_frozen():
    layer, x = make_layer("paper", bias=False, phi_rank=2, seed=10), make_rows().requires_grad_()
    layer.noise_band.set_timestep(TIMESTEPS)
    assert layer.bias is None
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad.abs().max() > 0
    assert layer.phi.left.grad.abs().max() > 0


def test_the_source_linear_is_copied():
    linear = nn.Linear(COLUMNS, 6)
    kept = linear.weight.detach().clone()
    layer = FakeQuantLinear(linear, profile=make_profile("paper"), noise_band=NoiseBand(1))
    with torch.no_grad():
        layer.weight.add_(1)
        layer.bias.add_(1)
    assert torch.equal(linear.weight, kept)
    half = FakeQuantLinear(linear.bfloat16(), profile=make_profile("paper"), noise_band=NoiseBand(1))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", PROFILES)
def test_state_comes_back_bitwise(name):
    layer, x = make_layer(name, phi_rank=4, seed=11), make_rows()
    layer.phi.advance_(DecaySchedule(ranks=(4, 2), num_steps=10, tail_share=0.1).at(6))
    other = make_layer(name, phi_rank=4, seed=12)
    other.load_state_dict(layer.state_dict(), strict=True)
    for module in (layer, other):
        module.noise_band.set_timestep(TIMESTEPS)
    assert other.phi.rank == 2
    assert torch.equal(layer(x), other(x))


def test_layers_that_do_not_fit_are_refused():
    band = NoiseBand(1)
    with pytest.raises(ValueError, match="group_size=64 does not divide in_features=96"):
        FakeQuantLinear(nn.Linear(96, 8), profile=make_profile("svdq_g64"), noise_band=band)
    with pytest.raises(ValueError, match="rotation=64 does not divide in_features=96"):
        FakeQuantLinear(nn.Linear(96, 8), profile=make_profile("convrot"), noise_band=band)
    with pytest.raises(ValueError, match=r"phi.rank=9 is outside 1..8 for a Linear 96 -> 8"):
        FakeQuantLinear(nn.Linear(96, 8), profile=make_profile("paper"), noise_band=band, phi_rank=9)
    layer = make_layer("paper")
    with pytest.raises(RuntimeError, match="called before its model"):
        layer(make_rows())
