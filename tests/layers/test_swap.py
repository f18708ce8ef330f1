"""prepare and fold over a whole model: what is chosen, what is refused, and that refusals change nothing."""

import copy

import pytest
import torch
from torch import nn

from qvgen.initializers.prepare import PrepareConfig, initialize_, prepare
from qvgen.initializers.rtn import RoundToNearest
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.packed_linear import PackedLinear
from qvgen.layers.swap import (
    fold,
    folded_copy,
    packed_layers,
    phi_suspended,
    quantized_layers,
    select_linears,
    swap_fake_quant_,
)
from qvgen.lowrank.decay import DecaySchedule
from tests.layers.model import BANDS, Model, make_inputs, make_model, prepared_model
from tests.profiles import PROFILES, make_profile

NAMES = (*(f"blocks.{i}.{layer}" for i in (0, 1) for layer in ("modulation", "up", "down")), "output")
EXACT = [name for name in PROFILES if make_profile(name).weight.granularity == "per_channel" and name != "paper_real"]
END = DecaySchedule(ranks=(4,), num_steps=2, tail_share=0.5).at(1)


def config(**options):
    return PrepareConfig(**({"profile": make_profile("paper"), "initializer": RoundToNearest()} | options))


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}, [type(m) for m in model.modules()]


def assert_unchanged(model, before):
    state, types = before
    assert [type(module) for module in model.modules()] == types
    assert set(model.state_dict()) == set(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# --------------------------------------------------------------------------- choosing layers


@pytest.mark.parametrize(
    ("include", "exclude", "skipped"),
    [
        (["*"], [], ()),
        (["*"], ["output"], ("output",)),
        (["blocks.*"], [], ("output",)),
        (["*.up", "*.down"], [], ("blocks.0.modulation", "blocks.1.modulation", "output")),
        (["*"], ["*.modulation", "blocks.1.*"], (*NAMES[:1], *NAMES[3:6])),
        (["blocks.[0]*"], [], NAMES[3:]),
    ],
)
def test_patterns_choose_by_name(include, exclude, skipped):
    model = make_model()
    report = select_linears(model, include=include, exclude=exclude)
    assert report.skipped == skipped
    assert report.quantized == tuple(name for name in NAMES if name not in skipped)
    assert not quantized_layers(model)


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        (["*", "transformer.*"], [], r"include pattern 'transformer.\*' matches none of the 7 Linears of Model"),
        (["*"], ["norm"], r"exclude pattern 'norm' matches none .*the first is 'blocks.0.modulation'.*remove it"),
        (["OUTPUT"], [], "include pattern 'OUTPUT' matches none"),
        (["output"], ["*"], "leave no Linear to quantize"),
        ([], [], "leave no Linear to quantize"),
    ],
)
def test_patterns_that_match_nothing_are_refused(include, exclude, message):
    model = make_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        prepare(model, config(include=include, exclude=exclude))
    assert_unchanged(model, before)


# --------------------------------------------------------------------------- prepare


@pytest.mark.parametrize("name", PROFILES)
def test_prepare_quantizes_what_was_chosen(name):
    model = make_model()
    output = model.output
    report = prepare(model, config(profile=make_profile(name), exclude=["output"], phi_rank=4, num_noise_bands=BANDS))
    assert report.quantized == NAMES[:-1]
    assert tuple(quantized_layers(model)) == NAMES[:-1]
    assert model.output is output
    bands = {id(layer.noise_band) for layer in quantized_layers(model).values()}
    assert len(bands) == 1
    for layer in quantized_layers(model).values():
        assert (layer.weight_quantizer.scale > 0).all()
        assert layer.phi.rank == 4
        error = (layer.weight - layer.effective_weight()).norm()
        assert error < (layer.weight - layer.quantized_weight()).norm()
    y = model(*make_inputs())
    y.square().mean().backward()
    assert y.isfinite().all()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all()


def test_layers_that_do_not_fit_are_named_and_nothing_changes():
    for options, message in (
        ({"phi_rank": 9}, "output: phi.rank=9 is outside 1..8 for a Linear 128 -> 8, or exclude the layer"),
        ({"profile": make_profile("svdq_g64"), "width": 96}, "blocks.0.modulation: group_size=64 does not divide"),
        ({"profile": make_profile("convrot"), "width": 96}, "blocks.0.modulation: rotation=64 does not divide"),
    ):
        model = make_model(width=options.pop("width", 128))
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            prepare(model, config(**options))
        assert_unchanged(model, before)
        model(torch.zeros(1, 2, model.output.in_features), torch.zeros(1, model.output.in_features), None)  # no hook


def test_models_without_timestep_are_refused_unchanged():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = snapshot(model)
    with pytest.raises(ValueError, match="Sequential.forward has no argument named timestep"):
        prepare(model, config())
    assert_unchanged(model, before)


def test_a_prepared_model_is_refused():
    model = prepared_model(make_profile("paper"))
    with pytest.raises(ValueError, match="quantized already; prepare a full-precision one"):
        prepare(model, config())


def test_a_folded_model_is_refused():
    model = prepared_model(make_profile("paper"), exclude=("output",))
    fold(model)
    with pytest.raises(ValueError, match="quantized already"):
        prepare(model, config())


def test_a_linear_with_two_names_is_not_left_behind_in_silence():
    """Half of a tied pair would stay in full precision, and no longer be tied."""
    model = make_model()
    model.blocks[1].up = model.blocks[0].up
    try:
        prepare(model, config())
    except ValueError as error:
        assert "blocks.1.up" in str(error)  # noqa: PT017 - either outcome is right
    else:
        assert isinstance(model.blocks[1].up, FakeQuantLinear)
        assert model.blocks[1].up is model.blocks[0].up


def test_phis_are_drawn_by_name_and_seed():
    """Leaving one layer out changes no other layer's start; another seed changes them."""
    whole = prepared_model(make_profile("paper"), phi_rank=4)
    part = prepared_model(make_profile("paper"), phi_rank=4, exclude=("blocks.0.up",))
    other = make_model()
    prepare(other, config(phi_rank=4, seed=1, num_noise_bands=BANDS))
    for name, layer in quantized_layers(part).items():
        assert torch.equal(layer.phi.left, quantized_layers(whole)[name].phi.left)
    lefts = [quantized_layers(model)["blocks.0.down"].phi.left for model in (whole, other)]
    assert not torch.equal(*lefts)
    initialize_(other, RoundToNearest(), seed=0)
    assert torch.equal(quantized_layers(other)["blocks.0.down"].phi.left, lefts[0])


def test_swap_returns_the_shared_bands():
    model = make_model()
    band = swap_fake_quant_(model, names=["output"], profile=make_profile("paper"), num_noise_bands=7)
    assert model.output.noise_band is band
    assert band.num_bands == 7
    assert model.output.phi is None


# --------------------------------------------------------------------------- the whole model


@pytest.mark.parametrize("name", EXACT)
def test_mixed_timesteps_equal_the_samples_alone(name):
    """Trained and packed, bitwise: neither the other samples nor their timesteps matter."""
    model = prepared_model(make_profile(name))
    inputs = make_inputs()
    with torch.no_grad():
        for _ in range(2):
            together = model(*inputs)
            for sample in range(3):
                alone = model(*(value[sample : sample + 1] for value in inputs))
                assert torch.equal(alone[0], together[sample])
            same = model(inputs[0], inputs[1], inputs[2][0])
            assert torch.equal(same[0], together[0])
            has_clips = make_profile(name).activation.clip
            assert torch.equal(same[1], together[1]) != has_clips  # the band matters where there are clips by band
            fold(model)


@pytest.mark.parametrize("name", PROFILES)
def test_the_folded_model_computes_what_was_trained(name):
    """Bitwise for exact profiles; elsewhere a rounding error of one layer may flip a code in the next.

    A flip is one step of one input out of 255, so even where one happens the outputs stay within 1 %, and most agree
    to float32.
    """
    model = prepared_model(make_profile(name, weight_bits=4, activation_bits=8), phi_rank=4)
    for layer in quantized_layers(model).values():
        layer.phi.advance_(END)
    inputs = make_inputs()
    with torch.no_grad():
        expected = model(*inputs)
        assert fold(model) == len(NAMES)
        got = model(*inputs)
    assert tuple(packed_layers(model)) == NAMES
    assert not quantized_layers(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    if name in EXACT:
        assert torch.equal(got, expected)
    else:
        near = (got - expected).abs() <= 1e-5 * expected.abs().max()
        assert near.float().mean() >= 0.9
        assert (got - expected).norm() <= 1e-2 * expected.norm()


def test_a_folded_copy_is_what_fold_gives_and_leaves_the_model_alone():
    model = prepared_model(make_profile("paper", weight_bits=3, activation_bits=4), phi_rank=4)
    with pytest.raises(ValueError, match="cannot fold blocks.0.modulation: Phi still has rank 4"):
        folded_copy(model)
    for layer in quantized_layers(model).values():
        layer.phi.advance_(END)
    before = snapshot(model)
    copied = folded_copy(model)
    assert_unchanged(model, before)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert not own & {value.data_ptr() for value in copied.state_dict().values()}
    inputs, others = make_inputs(), [value.flip(0) for value in make_inputs()]
    with torch.no_grad():
        expected = model(*inputs)
        model(*others)  # other timesteps: the copy must set the bands that its own layers read
        assert torch.equal(copied(*inputs), expected)
    fold(model)
    assert list(copied.state_dict()) == list(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in copied.state_dict().items())


def test_folding_again_changes_nothing():
    model = prepared_model(make_profile("paper"))
    assert fold(model) == len(NAMES)
    layers, before = packed_layers(model), snapshot(model)
    assert fold(model) == 0
    assert packed_layers(model) == layers
    assert_unchanged(model, before)
    assert fold(make_model()) == 0


def test_one_phi_with_rank_refuses_the_whole_fold():
    model = prepared_model(make_profile("paper"), phi_rank=4)
    layers = quantized_layers(model)
    for name, layer in layers.items():
        if name != "blocks.1.up":
            layer.phi.advance_(END)
    before = snapshot(model)
    with pytest.raises(ValueError, match="cannot fold blocks.1.up: Phi still has rank 4"):
        fold(model)
    assert_unchanged(model, before)
    with phi_suspended(model), pytest.raises(ValueError, match="cannot fold blocks.1.up"):
        fold(model)
    layers["blocks.1.up"].phi.advance_(END)
    assert fold(model) == len(NAMES)


def test_suspension_ends_even_when_something_fails():
    model, plain = prepared_model(make_profile("paper"), phi_rank=4), prepared_model(make_profile("paper"))
    inputs = make_inputs()
    with torch.no_grad():
        with_phi = model(*inputs)
        with phi_suspended(model):
            assert torch.equal(model(*inputs), plain(*inputs))
        assert torch.equal(model(*inputs), with_phi)
        with pytest.raises(KeyError), phi_suspended(model):
            raise KeyError
        assert torch.equal(model(*inputs), with_phi)
        with phi_suspended(plain):  # nothing to suspend
            plain(*inputs)


def test_resume_through_the_model_state_dict():
    """A model prepared anew takes over weights, grids, clips, and the rank of every Phi."""
    profile = make_profile("paper")
    model = prepared_model(profile, phi_rank=4)
    schedule = DecaySchedule(ranks=(4, 2), num_steps=10, tail_share=0.1)
    for layer in quantized_layers(model).values():
        layer.phi.advance_(schedule.at(6))
    other = prepared_model(profile, phi_rank=4, seed=3)
    other.load_state_dict(copy.deepcopy(model.state_dict()), strict=True)
    assert {layer.phi.rank for layer in quantized_layers(other).values()} == {2}
    with torch.no_grad():
        assert torch.equal(other(*make_inputs()), model(*make_inputs()))
    for layer in quantized_layers(other).values():
        layer.phi.advance_(schedule.at(9))
    assert fold(other) == len(NAMES)
    assert isinstance(other, Model)
    assert isinstance(other.output, PackedLinear)
