"""Grid and Profile: code ranges written out by hand, refused values by their message, round trips."""

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from qvgen.quant.grid import Grid, Profile, profile_from_bits
from tests.profiles import COLUMNS, PROFILES, make_profile

grids = st.builds(
    lambda bits, granularity, zero_point, group, dtype: Grid(
        bits=bits,
        granularity=granularity,
        zero_point=zero_point,
        group_size=group if granularity == "per_group" else None,
        scale_dtype=dtype,
    ),
    st.integers(2, 8),
    st.sampled_from(["per_tensor", "per_channel", "per_token", "per_group"]),
    st.sampled_from(["integer", "real", "none"]),
    st.integers(1, 512),
    st.sampled_from(["float32", "bfloat16", "float16"]),
)


def channel_grid(**options):
    return Grid(**({"bits": 4, "granularity": "per_channel"} | options))


def token_grid(**options):
    return Grid(**({"bits": 4, "granularity": "per_token"} | options))


@pytest.mark.parametrize(
    ("bits", "asymmetric", "symmetric"),
    [
        (2, (0, 3), (-1, 1)),
        (3, (0, 7), (-3, 3)),
        (4, (0, 15), (-7, 7)),
        (5, (0, 31), (-15, 15)),
        (6, (0, 63), (-31, 31)),
        (7, (0, 127), (-63, 63)),
        (8, (0, 255), (-127, 127)),
    ],
)
def test_code_ranges(bits, asymmetric, symmetric):
    for kind in ("integer", "real"):
        grid = channel_grid(bits=bits, zero_point=kind)
        assert (grid.qmin, grid.qmax, grid.symmetric) == (*asymmetric, False)
    grid = channel_grid(bits=bits, zero_point="none")
    assert (grid.qmin, grid.qmax, grid.symmetric) == (*symmetric, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits=1 is outside 2..8"),
        ({"arithmetic": "float"}, "arithmetic='float' is unknown; use one of reciprocal, division, unrounded"),
        ({"arithmetic": "division"}, "arithmetic='division' is of symmetric dynamic ranges, not zero_point='integer'"),
        ({"clip": 1.5}, "clip=1.5 is unknown; use one of True, False"),
        ({"bits": 9}, "bits=9 is outside 2..8"),
        ({"bits": "4"}, "bits='4' is outside"),
        ({"bits": 3.0}, "bits=3.0 is outside"),
        ({"bits": True}, "bits=True is outside"),
        ({"granularity": "per_row"}, "granularity='per_row' is unknown; use one of per_tensor"),
        ({"zero_point": "float"}, "zero_point='float' is unknown; use one of integer, real, none"),
        ({"scale_dtype": "float64"}, "scale_dtype='float64' is unknown; use one of float32"),
        ({"granularity": "per_group"}, "group_size=None with per_group"),
        ({"granularity": "per_group", "group_size": 0}, "group_size=0 with per_group"),
        ({"granularity": "per_group", "group_size": 64.0}, "group_size=64.0 with per_group"),
        ({"group_size": 64}, "group_size=64 needs granularity='per_group', not 'per_channel'"),
    ],
)
def test_bad_grids_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        channel_grid(**options)


def test_groups_of_a_row():
    grid = channel_grid(granularity="per_group", group_size=64)
    assert grid.num_groups(192) == 3
    assert channel_grid().num_groups(192) == 1
    with pytest.raises(ValueError, match="group_size=64 does not divide in_features=96; use 16 or 32 or 96"):
        grid.num_groups(96)
    with pytest.raises(ValueError, match="group_size=64 does not divide in_features=7; use a divisor of it"):
        grid.num_groups(7)


def test_a_grid_is_a_frozen_value():
    grid = channel_grid()
    assert grid == channel_grid()
    assert len({grid, channel_grid(), channel_grid(bits=5)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        grid.bits = 5
    assert channel_grid(scale_dtype="bfloat16").torch_scale_dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": token_grid()}, "weight granularity 'per_token'; use per_channel or per_group"),
        ({"weight": channel_grid(granularity="per_tensor")}, "weight granularity 'per_tensor'"),
        (
            {"activation": channel_grid()},
            "activation granularity 'per_channel'; use per_token, per_group or per_tensor",
        ),
        ({"activation": token_grid(zero_point="real")}, "activation zero_point 'real' runs on no integer kernel"),
        ({"rotation": 52}, "rotation=52 has no Hadamard matrix here; use 0 or 48 or 56"),
        ({"rotation": 1}, "rotation=1 has no Hadamard matrix here; use 0 or 2"),
        (
            {"rotation": 32, "rotation_kind": "regular"},
            "rotation=32 has no regular Hadamard matrix here; use 0 or 16 or 64",
        ),
        ({"rotation_kind": "random"}, "rotation_kind='random' is unknown; use one of sylvester, regular"),
        ({"weight": channel_grid(zero_point="none", arithmetic="division")}, "arithmetic and clip are of activations"),
        ({"weight": channel_grid(clip=False)}, "arithmetic and clip are of activations"),
        ({"rotation": -4}, "rotation=-4 has no Hadamard matrix here; use 0 or 2"),
        (
            {
                "weight": channel_grid(granularity="per_group", group_size=64),
                "activation": token_grid(granularity="per_group", group_size=32),
            },
            "weight group_size=64 and activation group_size=32 differ",
        ),
    ],
)
def test_bad_profiles_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Profile(**({"name": "own", "weight": channel_grid(), "activation": token_grid()} | options))


def test_a_profile_takes_the_first_rotation_that_divides_every_width():
    profile = profile_from_bits(
        name="own",
        weight_bits=4,
        activation_bits=4,
        weight={"granularity": "per_channel"},
        activation={"granularity": "per_token"},
        rotation={"kind": "regular", "sizes": [256, 64]},
    )
    assert (profile.rotation, profile.rotations) == (256, (256, 64))
    for widths, size in (((1536, 8960), 256), ((5120, 13824), 256), ((1920, 7680), 64), ((256, 64), 64)):
        fitted = profile.fitted(widths)
        assert (fitted.rotation, fitted.rotations, fitted.rotation_kind) == (size, (), "regular")
        assert Profile.from_dict(fitted.to_dict()) == fitted
    with pytest.raises(ValueError, match="rotation=64 does not divide in_features=1000; use 0 or 4$"):
        profile.fitted([1920, 1000])
    whole = profile.with_rotation(1920)
    assert (whole.rotation, whole.rotation_kind, whole.fitted([1920])) == (1920, "sylvester", whole)


def test_a_profile_says_which_widths_it_fits():
    make_profile("paper").check_fits(7)
    grouped = make_profile("svdq_g64")
    grouped.check_fits(192)
    with pytest.raises(ValueError, match="group_size=64 does not divide in_features=100"):
        grouped.check_fits(100)
    with pytest.raises(ValueError, match="rotation=64 does not divide in_features=96; use 0 or 16$"):
        make_profile("convrot").check_fits(96)
    whole_row = Profile(name="own", weight=channel_grid(), activation=token_grid(), rotation=1920)
    whole_row.check_fits(7680)
    with pytest.raises(ValueError, match="rotation=1920 does not divide in_features=8960; use 0 or 1792 or 2240"):
        whole_row.check_fits(8960)


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_of_conf_come_back_from_their_dict(name):
    profile = make_profile(name, weight_bits=4, activation_bits=8)
    assert profile.label == "w4a8"
    assert (profile.weight.bits, profile.activation.bits) == (4, 8)
    profile.check_fits(COLUMNS)
    assert Profile.from_dict(profile.to_dict()) == profile


def are_the_same_groups(weight, activation):
    return None in (weight.group_size, activation.group_size) or weight.group_size == activation.group_size


WEIGHTS = grids.filter(lambda grid: grid.granularity in ("per_channel", "per_group"))
ACTIVATIONS = grids.filter(
    lambda grid: (
        grid.zero_point != "real"
        and (
            grid.granularity in ("per_token", "per_group")
            or (grid.granularity, grid.scale_dtype) == ("per_tensor", "float32")
        )
    )
)


@settings(max_examples=50)
@given(
    sides=st.tuples(WEIGHTS, ACTIVATIONS).filter(lambda sides: are_the_same_groups(*sides)),
    rotation=st.sampled_from([0, 16, 64, 1920]),
)
def test_any_valid_profile_comes_back_from_its_dict(sides, rotation):
    profile = Profile(name="own", weight=sides[0], activation=sides[1], rotation=rotation)
    assert Profile.from_dict(profile.to_dict()) == profile


def test_malformed_dicts_are_refused():
    data = make_profile("paper").to_dict()
    with pytest.raises(ValueError, match="profile keys"):
        Profile.from_dict({key: value for key, value in data.items() if key != "rotation"})
    with pytest.raises(ValueError, match="profile keys"):
        Profile.from_dict(data | {"surprise": 1})
    with pytest.raises(ValueError, match="profile 'paper' has a malformed grid"):
        Profile.from_dict(data | {"weight": {"bits": 4}})
    with pytest.raises(ValueError, match="profile 'paper' has a malformed grid"):
        Profile.from_dict(data | {"weight": data["weight"] | {"surprise": 1}})
    with pytest.raises(ValueError, match="bits=12 is outside"):
        Profile.from_dict(data | {"weight": data["weight"] | {"bits": 12}})


def test_profile_from_bits_places_the_widths():
    profile = profile_from_bits(
        name="own",
        weight_bits=2,
        activation_bits=6,
        weight={"granularity": "per_channel", "zero_point": "none"},
        activation={"granularity": "per_token"},
        rotation=32,
    )
    assert profile == Profile(
        name="own", weight=channel_grid(bits=2, zero_point="none"), activation=token_grid(bits=6), rotation=32
    )
