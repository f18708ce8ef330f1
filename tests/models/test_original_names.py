"""Names of the original code: checked against diffusers' own converter, which goes the other way."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from qvgen.config.leaves import load_leaf
from qvgen.errors import UserError
from qvgen.models.original_names import WAN_ORIGINAL_NAMES, original_names
from tests.deploy.exporters.packed_models import tiny_wan

FAMILIES = ("tiny", "small", "wan", "wan-14b", "wan2.2-a14b", "wan2.2-ti2v")


def test_the_converter_of_diffusers_gives_every_tensor_back() -> None:
    state = tiny_wan().state_dict()
    names = original_names(state, WAN_ORIGINAL_NAMES)
    assert names["blocks.0.attn2.to_out.0.bias"] == "blocks.0.cross_attn.o.bias"
    assert names["scale_shift_table"] == "head.modulation"
    back = convert_wan_transformer_to_diffusers({names[key]: value for key, value in state.items()})
    assert back.keys() == state.keys()
    assert all(back[key] is state[key] for key in state)
    again = tiny_wan()
    again.load_state_dict(back, strict=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_wan_family_at_its_full_size(name: str) -> None:
    family = load_leaf("model", name)
    with torch.device("meta"):
        state = WanTransformer3DModel(**family.transformer_config).state_dict()
    names = original_names(state, family.original_names)
    assert len(set(names.values())) == len(state)
    assert not [key for key in names.values() if "attn1" in key or "condition_embedder" in key or "ffn.net" in key]
    back = convert_wan_transformer_to_diffusers({names[key]: value for key, value in state.items()})
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in state.items()}


def test_cogvideox_has_none_and_two_equal_names_are_refused() -> None:
    assert not hasattr(load_leaf("model", "cogvideox"), "original_names")
    with pytest.raises(UserError, match="'b.weight' and 'a.weight' are both 'c.weight'"):
        original_names(["a.weight", "b.weight"], [(r"^[ab]$", "c")])
