"""How models are sampled unless something else is asked for, against what their authors publish.

Wan: wan/configs/ of Wan-Video's Wan2.1 and Wan2.2 (shared_config.py, wan_t2v_A14B.py, wan_ti2v_5B.py, wan_i2v_14B.py,
wan_i2v_A14B.py), generate.py's shift of 5.0, and its 3.0 for images of 480 pixels. The negative
prompt is compared by its SHA-256, taken from shared_config.py's sample_neg_prompt.
"""

import hashlib
import re
from pathlib import Path

import pytest

from qvgen.config.leaves import load_leaf

WAN_NEGATIVE_SHA256 = "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"

IMAGE_NEGATIVE = {"wan-i2v-14b": "镜头晃动\N{FULLWIDTH COMMA}"}
"""What wan_i2v_14B.py puts before it: the camera shakes."""

# name: shift in training and sampling, steps, guidance, frames, frames per second
WAN = {
    "wan": (3.0, 50, 5.0, 81, 16),  # the paper's recipe, not the authors' 8 to 12 and 6
    "wan-14b": (5.0, 50, 5.0, 81, 16),
    "wan2.2-a14b": (12.0, 40, 4.0, 81, 16),
    "wan2.2-ti2v": (5.0, 50, 5.0, 121, 24),
    "wan2.2-i2v-5b": (5.0, 50, 5.0, 121, 24),
    "wan-i2v-14b": (3.0, 40, 5.0, 81, 16),
    "wan2.2-i2v-a14b": (5.0, 40, 3.5, 81, 16),
}


@pytest.mark.parametrize("name", WAN)
def test_wan_is_sampled_as_its_authors_do(name: str) -> None:
    family = load_leaf("model", name)
    found = family.num_inference_steps, family.guidance_scale, family.sampling_frames, family.fps
    assert (family.objective.shift, *found) == WAN[name]
    assert family.scheduler().config.flow_shift == family.objective.shift
    own = IMAGE_NEGATIVE.get(name, "")
    assert family.negative_prompt.startswith(own)
    shared = family.negative_prompt.removeprefix(own)
    assert hashlib.sha256(shared.encode()).hexdigest() == WAN_NEGATIVE_SHA256
    assert load_leaf("model", name, negative_prompt="").negative_prompt == ""
    page = (
        (Path(__file__).resolve().parents[2] / "docs" / "models.md")
        .read_text(encoding="utf-8")
        .partition("**Sampling**")[2]
    )
    row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` ")).split("|")[2:]
    shift, steps, guidance, clip = (re.findall(r"\d+\.?\d*", cell) for cell in row[:4])
    documented = float(shift[0]), int(steps[0]), float(guidance[0]), *map(int, clip)
    assert documented == WAN[name]
    assert row[4].strip() == ("Wan's, with a shaking camera" if own else "Wan's")


def test_the_experts_have_a_guidance_each() -> None:
    family = load_leaf("model", "wan2.2-a14b")
    assert (family.guidance_scale, family.guidance_scale_low) == (4.0, 3.0)
    assert family.component_config("model_index")["boundary_ratio"] == 0.875
    family = load_leaf("model", "wan2.2-i2v-a14b")
    assert (family.guidance_scale_low, family.component_config("model_index")["boundary_ratio"]) == (3.5, 0.9)


@pytest.mark.parametrize(
    "name",
    [
        "cogvideox",
        "cogvideox-5b",
        "cogvideox1.5",
        "cogvideox-i2v",
        "cogvideox1.5-i2v",
        "small",
        "tiny",
        "hunyuanvideo",
        "hunyuanvideo1.5",
        "hunyuanvideo1.5-i2v",
        "mochi",
        "latte",
    ],
)
def test_the_others_lead_away_from_the_empty_caption(name: str) -> None:
    assert load_leaf("model", name).negative_prompt == ""


@pytest.mark.parametrize("name", ["wan", "tiny"])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("shift", 0.5, "model.shift=0.5 is no finite number of at least 1"),
        ("shift", "five", "model.shift='five' is of the wrong type; give float"),
        ("shift", float("inf"), "model.shift=inf is no finite number"),
        ("num_inference_steps", 0, "model.num_inference_steps=0 is no whole number of at least 1"),
        ("num_inference_steps", 2.5, "model.num_inference_steps=2.5 is of the wrong type; give int"),
        ("guidance_scale", -1, "model.guidance_scale=-1 is no finite number of at least 0"),
        ("guidance_scale", True, "model.guidance_scale=True is of the wrong type; give float"),
    ],
)
def test_numbers_of_sampling_have_ranges(name: str, key: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_leaf("model", name, **{key: value})


@pytest.mark.parametrize("name", ["wan", "tiny"])
def test_a_negative_prompt_is_text(name: str) -> None:
    with pytest.raises(ValueError, match=r"model.negative_prompt=\['a', 'b'\] is of the wrong type; give str"):
        load_leaf("model", name, negative_prompt=["a", "b"])
