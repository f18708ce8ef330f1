"""What a profile's runtime has is known before anything is computed; what is refused is in tests/verbs/test_bad_input.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qvgen.config.bits import Bits
from qvgen.config.leaves import load_profile
from qvgen.config.runtime_check import check_runtime
from qvgen.errors import UserError
from qvgen.quant.grid import Profile
from qvgen.quant.runtime import Runtime


def profile(name: str, bits: str) -> Profile:
    made: Profile = load_profile(name, Bits.parse(bits))
    return made


@pytest.mark.parametrize(
    ("name", "bits", "additions"),
    [
        ("paper", "w2a2", ("rotation", "branch", "static", "widths", "smoothing")),
        ("convrot", "w4a4", ()),
        ("convrot", "w3a8", ()),
        ("int8", "w3a8", ()),
        ("svdq_g64", "w4a4", ("smoothing", "branch")),
        ("w4a8_row", "w3a8", ()),
    ],
)
def test_what_a_runtime_has_passes(name: str, bits: str, additions: tuple[str, ...]) -> None:
    check_runtime(profile(name, bits), additions=additions, init="gptq")


def test_a_grid_without_its_runtime_takes_all() -> None:
    free = replace(profile("int8", "w2a2"), runtime=None)
    check_runtime(free, additions=("rotation",), init="vidit_q")


def test_a_profile_that_was_fitted_to_a_model_is_still_its_files() -> None:
    check_runtime(profile("convrot", "w4a4").fitted([1920]))
    with pytest.raises(UserError, match=r"rotation=\('regular', 256, 64\), not \('regular', 16\)"):
        check_runtime(replace(profile("convrot", "w4a4"), rotation=16, rotations=()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scales_of_the_precisions_that_a_runtime_takes_pass(dtype: str) -> None:
    base = profile("svdq_g64", "w4a4")
    sides = {side: replace(getattr(base, side), scale_dtype=dtype) for side in ("weight", "activation")}
    check_runtime(replace(base, **sides))


def test_a_scale_that_a_runtime_has_in_one_precision_alone_keeps_it() -> None:
    base = profile("w4a8_row", "w4a8")
    assert (base.weight.scale_dtype, base.activation.scale_dtype) == ("bfloat16", "float32")
    check_runtime(replace(base, weight=replace(base.weight, scale_dtype="float16")))
    with pytest.raises(UserError, match="computes with activation.scale_dtype=float32, not float16"):
        check_runtime(replace(base, activation=replace(base.activation, scale_dtype="float16")))
    with pytest.raises(UserError, match="computes with weight.scale_dtype=bfloat16, not float32.*"
        "dtype out, choose profile=convrot or int8 or paper, or add"):  # fmt: skip
        check_runtime(replace(base, weight=replace(base.weight, scale_dtype="float32")))


def test_a_refused_option_names_the_profiles_that_have_it() -> None:
    base = profile("convrot", "w4a4")
    with pytest.raises(
        UserError, match=r"weight.zero_point=none, not real; leave \S+ out, choose profile=paper, or add"
    ):
        check_runtime(replace(base, weight=replace(base.weight, zero_point="real")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernels": 3}, "runtime has no 'kernels'; it says name, weight_bits"),
        ({"additions": ["lora"]}, "additions='lora' of runtime is unknown; use of rotation, smoothing"),
        ({"weight_bits": [4, 9]}, "weight_bits=9"),
        ({"name": 7}, "name"),
    ],
)
def test_a_malformed_runtime_is_refused(change: dict[str, object], message: str) -> None:
    data = {"name": "theirs", "weight_bits": [4], "activation_bits": [4], **change}
    with pytest.raises(ValueError, match=message):
        Runtime.from_dict(data)
