"""The packed layer against the fake-quantized layer that it was folded from: same codes, same outputs.

Bitwise where every product is a sum of whole numbers (scales outside of the sum, whole zero points): both layers then
round the same exact sum in the same order. Elsewhere within the rounding errors of two float32 sums.
"""

import copy

import pytest
import torch

from qvgen.layers.fake_quant_product import rotated
from qvgen.layers.layer_form import LayerForm
from qvgen.layers.layer_spec import layer_spec
from qvgen.layers.noise_band import NoiseBand
from qvgen.layers.packed_linear import PackedLinear
from qvgen.lowrank.decay import DecaySchedule
from qvgen.quant.affine import choose_qparams, fake_quantize
from qvgen_kernels import LinearTensors
from qvgen_kernels.reference import quantize_activations
from tests.layers.model import BANDS, TIMESTEPS, make_layer
from tests.profiles import COLUMNS, PROFILES, REAL, make_profile

PAIRS = [(w, a) for w in range(2, 9) for a in range(2, 9)]
UNIT = 2.0**-24
"""One rounding of a float32 operation, relative."""


def make_input(seed=0, tokens=4, columns=COLUMNS):
    generator = torch.Generator().manual_seed(seed + 2000)
    x = torch.randn(3, tokens, columns, generator=generator) * 10 ** torch.linspace(-2, 2, tokens)[:, None]
    x[..., 7] *= 8
    return x


def is_exact(profile):
    """Whether the layer multiplies whole numbers and scales the sum afterwards."""
    return profile.weight.granularity == "per_channel" and profile.weight.zero_point != "real"


def input_values(layer, x):
    """Grid values of the layer's input, rotated as the profile says, float64 [M, K]."""
    profile = layer.profile
    rows = rotated(x.flatten(0, -2), profile)
    bands = layer.noise_band.row_index(x).repeat_interleave(x[0, ..., 0].numel())
    tables = layer.activation_quantizer.tables()
    low, high = (None if table is None else table.detach()[bands][:, None] for table in tables)
    scale, zero = choose_qparams(rows, grid=profile.activation, clip_low=low, clip_high=high)
    return fake_quantize(rows, scale=scale, zero_point=zero, grid=profile.activation).double()


def rounding_bound(layer, x):
    """Largest difference of two float32 evaluations of one output, [M, N].

    Each side rounds its operands (2), K products and K - 1 additions in any order, two scales, the groups' sum and
    the bias: (2 K + 16) units of the sum of magnitudes for both together. A real zero point is subtracted after the
    sum on one side, so there the magnitudes are those of the raw codes and of the zero point.
    """
    values = layer.quantized_weight().double().abs()
    if layer.profile.weight.zero_point == "real":
        scale, zero = (value.double() for value in layer.weight_quantizer.qparams())
        values = scale * (layer.weight_quantizer.codes(layer.weight).double() + zero)
    size = input_values(layer, x).abs() @ values.T
    bias = 0 if layer.bias is None else layer.bias.detach().double().abs()
    return UNIT * ((2 * x.shape[-1] + 16) * size + 2 * bias)


@pytest.mark.parametrize("name", PROFILES)
def test_outputs_are_those_of_the_trained_layer(name):
    """All pairs of bit-widths, a batch of three noise bands, with bias and without."""
    for index, (weight_bits, activation_bits) in enumerate(PAIRS):
        layer = make_layer(
            name, weight_bits=weight_bits, activation_bits=activation_bits, seed=index, bias=bool(index % 2)
        )
        layer.noise_band.set_timestep(TIMESTEPS)
        packed = PackedLinear.from_fake_quant(layer)
        x = make_input(index)
        with torch.no_grad():
            expected, got = layer(x), packed(x)
        assert got.dtype == torch.float32
        assert expected.abs().max() > 0
        if is_exact(layer.profile):
            assert torch.equal(got, expected), (weight_bits, activation_bits)
        else:
            error = (got.double() - expected.double()).abs().flatten(0, 1)
            assert (error <= rounding_bound(layer, x)).all(), (weight_bits, activation_bits)


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("columns", [64, 192])
def test_outputs_are_float64_products_of_the_grid_values(name, columns):
    """Against a product that neither layer computes: float64 of the two fake-quantized operands."""
    layer = make_layer(name, columns=columns, weight_bits=3, activation_bits=4)
    layer.noise_band.set_timestep(TIMESTEPS)
    x = make_input(columns=columns)
    exact = input_values(layer, x) @ layer.quantized_weight().double().T + layer.bias.detach().double()
    with torch.no_grad():
        error = (PackedLinear.from_fake_quant(layer)(x).double().flatten(0, 1) - exact).abs()
    assert (error <= rounding_bound(layer, x)).all()


@pytest.mark.parametrize("name", PROFILES)
def test_folded_codes_are_the_trained_codes(name):
    """Exactly, for every bit-width and widths that do not fill their last byte where the profile allows it."""
    odd = make_profile(name).weight.group_size is None and not make_profile(name).rotation
    for bits in range(2, 9):
        layer = make_layer(name, weight_bits=bits, columns=61 if odd else COLUMNS, seed=bits)
        with torch.no_grad():  # a zero point and a scale that training has pushed off the grid
            layer.weight_quantizer.scale[0] = -1.0
            if layer.weight_quantizer.zero_point is not None:
                layer.weight_quantizer.zero_point[1] = 2.0**bits + 3
                layer.weight_quantizer.zero_point[2] = -2.0
        packed = PackedLinear.from_fake_quant(layer)
        codes = packed.integer_codes()
        assert codes.dtype == (torch.int8 if layer.profile.weight.symmetric else torch.uint8)
        assert torch.equal(codes, layer.weight_quantizer.codes(layer.weight))
        assert torch.equal(packed.dequantized_weight(), layer.quantized_weight())
        difference = (layer.quantized_weight() - layer.weight).double().square().sum()
        share = (difference / layer.weight.double().square().sum()).item()
        assert packed.weight_error == pytest.approx(share, rel=1e-6)  # the subtraction is in float32


@pytest.mark.parametrize("name", PROFILES)
def test_rows_and_samples_do_not_meet(name):
    """A token or a sample alone == in its batch, bitwise, for every profile: also with groups and real zero points."""
    layer = make_layer(name, seed=1)
    layer.noise_band.set_timestep(TIMESTEPS)
    packed, x = PackedLinear.from_fake_quant(layer), make_input()
    y = packed(x)
    others = torch.ones(3, 4, dtype=torch.bool)
    others[1, 2] = False
    for value in (0.0, 1e20, float("nan")):
        disturbed = x.clone()
        disturbed[1, 2] = value
        assert torch.equal(packed(disturbed)[others], y[others])
    for sample, timestep in enumerate(TIMESTEPS):
        packed.noise_band.set_timestep(timestep)
        assert torch.equal(packed(x[sample][None])[0], y[sample])
        for token in range(4):
            assert torch.equal(packed(x[sample, token][None])[0], y[sample, token])


@pytest.mark.parametrize("name", PROFILES)
def test_dead_constant_and_huge_channels_spoil_nothing(name):
    layer, x = make_layer(name, seed=2), make_input()
    layer.noise_band.set_timestep(TIMESTEPS)
    before = PackedLinear.from_fake_quant(layer)(x)
    others = [0, 1, 3, 4, 5]
    for value in (0.0, 0.3, -0.3, 1e20):
        with torch.no_grad():
            layer.weight[2] = value
            scale, zero = choose_qparams(layer.weight, grid=layer.profile.weight)
            layer.weight_quantizer.scale[2] = scale[2]
            if layer.weight_quantizer.zero_point is not None:
                layer.weight_quantizer.zero_point[2] = zero[2]
        after = PackedLinear.from_fake_quant(layer)(x)
        assert after.isfinite().all()
        assert torch.equal(after[..., others], before[..., others])


# --------------------------------------------------------------------------- Phi


def test_a_fold_is_refused_while_phi_has_rank():
    layer = make_layer("paper", phi_rank=4)
    schedule = DecaySchedule(ranks=(4, 2), num_steps=10, tail_share=0.1)
    for step in (0, 4, 5, 8):  # open, closed, dropped to 2, closed
        layer.phi.advance_(schedule.at(step))
        with pytest.raises(
            ValueError, match=f"Phi still has rank {schedule.at(step).rank}; train until its decay is over"
        ):
            PackedLinear.from_fake_quant(layer)
    layer.phi.suspended = True  # a measurement without Phi is no end of the decay
    with pytest.raises(ValueError, match="Phi still has rank 2"):
        PackedLinear.from_fake_quant(layer)
    layer.phi.suspended = False
    layer.phi.advance_(schedule.at(9))
    layer.noise_band.set_timestep(TIMESTEPS)
    assert torch.equal(PackedLinear.from_fake_quant(layer)(make_input()), layer(make_input()))


# --------------------------------------------------------------------------- as a module


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("bits", [3, 4])
def test_state_comes_back_bitwise(name, bits):
    layer = make_layer(name, weight_bits=bits, seed=3)
    packed = PackedLinear.from_fake_quant(layer)
    state = packed.state_dict()
    dtypes = {"codes": torch.uint8, "weight_scale": torch.float32, "bias": torch.float32}
    dtypes |= {"clip_high": torch.float32} if layer.profile.activation.clip else {}
    dtypes |= {"codes_high": torch.uint8} if bits == 3 else {}
    dtypes |= {} if layer.profile.activation.symmetric else {"clip_low": torch.float32}
    kind = layer.profile.weight.zero_point
    dtypes |= {} if kind == "none" else {"weight_zero_point": torch.float32 if kind == "real" else torch.uint8}
    assert {key: value.dtype for key, value in state.items()} == dtypes
    other = PackedLinear(COLUMNS, 6, bias=True, form=LayerForm.of(layer), noise_band=NoiseBand(BANDS))
    for module in (packed, other):
        module.noise_band.set_timestep(TIMESTEPS)
    x = make_input()
    assert not torch.equal(other(x), packed(x))  # and with this it has a prepacked copy of its zeros
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(x), packed(x))
    assert torch.equal(copy.deepcopy(packed)(x), packed(x))
    with pytest.raises(RuntimeError, match="weight_scale"):
        other.load_state_dict({key: value for key, value in state.items() if key != "weight_scale"})
    assert packed.nbytes() == sum(value.numel() * value.element_size() for value in state.values())


def test_a_cast_of_the_model_leaves_the_trained_numbers():
    """bfloat16 scales would be another network: only inputs and outputs change their type."""
    layer = make_layer("paper", seed=4)
    packed = PackedLinear.from_fake_quant(layer)
    packed.noise_band.set_timestep(TIMESTEPS)
    x = make_input()
    before = {key: value.clone() for key, value in packed.state_dict().items()}
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        moved = copy.deepcopy(packed).to(dtype)
        assert all(torch.equal(value, before[key]) for key, value in moved.state_dict().items())
        assert all(value.dtype == before[key].dtype for key, value in moved.state_dict().items())
        assert torch.equal(moved(x), packed(x))
    moved = copy.deepcopy(packed).bfloat16()
    half = x.bfloat16()
    y = moved(half)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, packed(half.float()).bfloat16())  # one rounding, at the border


@pytest.mark.parametrize("name", [name for name in PROFILES if name != REAL])
def test_bfloat16_inputs_stay_near_the_trained_layer(name):
    """Under autocast the trained layer rounds its product to bfloat16 once more: two roundings of 2^-9."""
    layer = make_layer(name, bias=False, seed=5)
    layer.noise_band.set_timestep(TIMESTEPS)
    x = make_input().bfloat16()
    got = PackedLinear.from_fake_quant(layer)(x).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer(x).float().detach()
    if is_exact(layer.profile):
        assert ((got - expected).abs() <= 3 * 2.0**-9 * expected.abs()).all()
    else:  # dequantized operands are no bfloat16 numbers: two more roundings of each term
        size = input_values(layer, x).abs() @ layer.quantized_weight().double().abs().T
        assert ((got - expected).abs().flatten(0, 1) <= 5 * 2.0**-9 * size).all()


def test_bytes_per_weight():
    """Canonical sizes of kernels.md: 4 bits at most 0.51 and 3 bits at most 0.385 bytes with everything."""
    for bits, most in ((2, 0.26), (3, 0.385), (4, 0.51), (8, 1.01)):
        form = LayerForm(profile=make_profile("paper", weight_bits=bits))
        packed = PackedLinear(1920, 1920, bias=True, form=form, noise_band=NoiseBand(50))
        assert packed.nbytes() / 1920**2 <= most


def test_shapes_are_known_without_memory():
    form = LayerForm(profile=make_profile("svdq_g64"))
    packed = PackedLinear(COLUMNS, 6, bias=False, form=form, noise_band=NoiseBand(BANDS), device="meta")
    layer = make_layer("svdq_g64", bias=False)
    shapes = {key: (value.shape, value.dtype) for key, value in packed.state_dict().items()}
    folded = PackedLinear.from_fake_quant(layer).state_dict()
    assert shapes == {key: (value.shape, value.dtype) for key, value in folded.items()}
    assert repr(packed) == "PackedLinear(128 -> 6, svdq_g64 w3a3)"


def test_any_layout_of_rows():
    layer = make_layer("paper", seed=6)
    layer.noise_band.set_timestep(TIMESTEPS)
    packed, x = PackedLinear.from_fake_quant(layer), make_input(tokens=6)
    y = packed(x)
    assert torch.equal(packed(x.reshape(3, 2, 3, COLUMNS)).reshape(y.shape), y)
    assert torch.equal(packed(x.reshape(18, COLUMNS)).reshape(y.shape), y)
    assert torch.equal(packed(x.transpose(1, 2).contiguous().transpose(1, 2)), y)
    assert packed(x[:, :0]).shape == (3, 0, 6)


def test_an_empty_batch_is_an_empty_output():
    """As the trained layer and the kernels' contract have it (M = 0)."""
    layer = make_layer("paper", seed=6)
    layer.noise_band.set_timestep(TIMESTEPS)
    x = make_input()[:0]
    assert layer(x).shape == (0, 4, 6)
    assert PackedLinear.from_fake_quant(layer)(x).shape == (0, 4, 6)


def test_kernels_by_name():
    layer = make_layer("paper", seed=7)
    layer.noise_band.set_timestep(TIMESTEPS)
    x = make_input()
    named = PackedLinear.from_fake_quant(layer, kernel="reference")
    assert named.prepack_() == "reference"
    assert torch.equal(named(x), PackedLinear.from_fake_quant(layer)(x))
    with pytest.raises(ValueError, match="no_such_kernel"):
        PackedLinear.from_fake_quant(layer, kernel="no_such_kernel")(x)


@pytest.mark.parametrize("name", PROFILES)
def test_the_spec_says_what_the_profile_says(name):
    profile = make_profile(name, weight_bits=4, activation_bits=8)
    spec = layer_spec(LayerForm(profile=profile), in_features=COLUMNS, out_features=6)
    assert (spec.in_features, spec.out_features) == (COLUMNS, 6)
    assert (spec.weight_bits, spec.activation_bits) == (4, 8)
    assert (spec.weight_zero_point, spec.activation_zero_point) == (
        profile.weight.zero_point,
        profile.activation.zero_point,
    )
    groups = (spec.weight_group_size, spec.activation_group_size)
    assert groups == ((64, 64) if name == "svdq_g64" else (0, 0))
    assert (spec.scale_dtype, spec.rotation) == (profile.activation.scale_dtype, profile.rotation)


@pytest.mark.parametrize("name", PROFILES)
def test_input_codes_are_those_that_the_kernel_multiplies(name):
    """What is counted as a flipped code is what both layers compute with: of a batch of three noise bands, bitwise."""
    for bits in range(2, 9):
        layer = make_layer(name, activation_bits=bits, seed=bits)
        layer.noise_band.set_timestep(TIMESTEPS)
        packed, x = PackedLinear.from_fake_quant(layer), make_input(bits)
        codes = layer.input_codes(x)
        assert codes.shape == (12, COLUMNS)
        assert torch.equal(packed.input_codes(x), codes)
        clips = [clip.squeeze(-1) for clip in packed.row_params(x, bits=bits)]
        tensors = LinearTensors(None, *clips)
        operand, _, zero = quantize_activations(x.flatten(0, 1), spec=packed.spec, tensors=tensors)
        assert torch.equal((operand + zero.unsqueeze(-1)).flatten(1), codes.float())
