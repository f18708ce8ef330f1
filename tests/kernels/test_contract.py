"""LinearSpec: its checks, its text and the numbers derived from it, against values worked out by hand."""

import dataclasses
import json

import pytest

from qvgen_kernels import LinearSpec

BASE = {"in_features": 96, "out_features": 64, "weight_bits": 3, "activation_bits": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_bits": 1}, "weight_bits=1"),
        ({"weight_bits": 9}, "weight_bits=9"),
        ({"activation_bits": True}, "activation_bits=True"),
        ({"activation_bits": 4.0}, r"activation_bits=4\.0"),
        ({"in_features": 0}, "in_features=0"),
        ({"out_features": -1}, "out_features=-1"),
        ({"weight_group_size": 100}, "weight_group_size=100 does not divide in_features=96"),
        ({"activation_group_size": 36}, "activation_group_size=36"),
        ({"weight_group_size": 32, "activation_group_size": 48}, "weight_group_size=32 and .*=48 differ"),
        ({"rotation": 64}, "rotation=64 does not divide in_features=96; use 0 or 48 or 96"),
        ({"rotation": 3}, "rotation=3 has no Hadamard matrix here; use 0 or 2 or 4"),
        ({"rotation": 1}, "rotation=1 has no Hadamard matrix here; use 0 or 2"),
        ({"rotation": 52, "in_features": 1040}, "rotation=52 has no Hadamard matrix here; use 0 or 40 or 80"),
        ({"rotation": 5, "in_features": 5}, "rotation=5 has no Hadamard matrix here; use 0$"),
        ({"rotation": 32, "rotation_kind": "regular"}, "rotation=32 has no regular Hadamard matrix here; use 0 or 16$"),
        ({"rotation": 64, "rotation_kind": "regular"}, "rotation=64 does not divide in_features=96; use 0 or 16$"),
        ({"rotation_kind": "paley"}, "rotation_kind='paley' is unknown; use one of sylvester, regular"),
        ({"activation_arithmetic": "float"}, "activation_arithmetic='float' is unknown"),
        ({"activation_arithmetic": "division"}, "'division' is of symmetric dynamic activations; use reciprocal"),
        (
            {"activation_arithmetic": "unrounded", "activation_zero_point": "none", "activation_range": "static"},
            "'unrounded' is of symmetric dynamic activations",
        ),
        ({"rotation": -4}, "rotation=-4 must be a whole number"),
        ({"weight_zero_point": "maybe"}, "weight_zero_point='maybe'"),
        ({"activation_zero_point": "real"}, "activation_zero_point='real'"),
        ({"activation_range": "fixed"}, "activation_range='fixed' is unknown; use one of dynamic, static"),
        ({"activation_range": "static", "activation_group_size": 32}, "activation_group_size=32 with static ranges"),
        ({"branch_rank": 65}, r"branch_rank=65 is above the rank of a \[64, 96\] weight"),
        ({"branch_rank": -1}, "branch_rank=-1 must be a whole number"),
        ({"scale_dtype": "float64"}, "scale_dtype='float64'"),
        ({"function": "relu"}, "function='relu' is unknown; use one of none, gelu_tanh, silu"),
        (
            {"in_features": 33026, "weight_bits": 8, "activation_bits": 8},
            "2147515650, which int32 can't hold",
        ),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        LinearSpec(**(BASE | change))


@pytest.mark.parametrize(
    ("change", "bound"),
    [
        ({}, 96 * 15 * 7),
        ({"weight_zero_point": "none"}, 96 * 15 * 4),
        ({"weight_zero_point": "real", "activation_zero_point": "none"}, 96 * 7 * 7),
        ({"activation_group_size": 32}, 32 * 15 * 7),
        ({"in_features": 33025, "weight_bits": 8, "activation_bits": 8}, 2147450625),
    ],
)
def test_accumulator_bound(change, bound):
    assert LinearSpec(**(BASE | change)).accumulator_bound == bound


def test_groups():
    spec = LinearSpec(**BASE, activation_group_size=32)
    assert (spec.group_size, spec.num_groups, spec.num_weight_groups) == (32, 3, 1)
    spec = LinearSpec(**BASE, weight_group_size=48)
    assert (spec.group_size, spec.num_groups, spec.num_weight_groups) == (48, 2, 2)


def test_text_is_canonical_and_complete():
    spec = LinearSpec(**BASE, rotation=32, scale_dtype="bfloat16", weight_group_size=32)
    text = spec.to_string()
    assert text == LinearSpec(**dict(reversed(json.loads(text).items()))).to_string()
    assert LinearSpec.from_string(text) == spec
    assert len(json.loads(text)) == 12  # fields that came later are not in it while they have their old meaning
    for change in (
        {"function": "silu"},
        {"rotation_kind": "regular", "rotation": 16},
        {"activation_arithmetic": "division", "activation_zero_point": "none"},
    ):
        other = dataclasses.replace(spec, **change)
        assert LinearSpec.from_string(other.to_string()) == other != spec
    assert hash(LinearSpec.from_string(text)) == hash(spec)
    assert dataclasses.replace(spec, rotation=16).to_string() != text


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"in_features":1}'])
def test_bad_text_is_refused(text):
    with pytest.raises(ValueError, match=r"LinearSpec\.to_string"):
        LinearSpec.from_string(text)


def test_unknown_key_is_refused():
    values = json.loads(LinearSpec(**BASE).to_string())
    with pytest.raises(ValueError, match="in_feature_count"):
        LinearSpec.from_string(json.dumps(values | {"in_feature_count": 96}))
