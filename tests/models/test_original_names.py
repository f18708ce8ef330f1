"""Names of the original code: checked against diffusers' own converters, which go the other way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_hunyuan_video_transformer_to_diffusers,
    convert_ltx_transformer_checkpoint_to_diffusers,
    convert_wan_transformer_to_diffusers,
)
from torch import Tensor

from qvgen.config.leaves import load_leaf
from qvgen.errors import UserError
from qvgen.models.original.names import (
    HUNYUAN_VIDEO_ORIGINAL_NAMES,
    ORIGINAL_NAMES,
    WAN_ORIGINAL_NAMES,
    OriginalNames,
    original_names,
)
from qvgen.models.original.tensors import from_original, join_original, original_sources
from tests.deploy.exporters.packed_models import tiny_hunyuan_video, tiny_ltx, tiny_wan

CONVERTERS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "WanTransformer3DModel": convert_wan_transformer_to_diffusers,
    "LTXVideoTransformer3DModel": convert_ltx_transformer_checkpoint_to_diffusers,
    "HunyuanVideoTransformer3DModel": convert_hunyuan_video_transformer_to_diffusers,
}
FAMILIES = ("tiny", "small", "wan", "wan-14b", "wan2.2-a14b", "wan2.2-ti2v", "ltx", "ltx-13b", "hunyuanvideo")


def original(state: dict[str, Tensor], names: OriginalNames) -> dict[str, Tensor]:
    sources = original_sources(state, names)
    return {key: join_original(key, [state[one] for one in own], names) for key, own in sources.items()}


@pytest.mark.parametrize("make", [tiny_wan, tiny_ltx])
def test_the_converter_of_diffusers_gives_every_tensor_back(make: Callable[[], Any]) -> None:
    model = make()
    state, name = model.state_dict(), type(model).__name__
    back = CONVERTERS[name](original(state, ORIGINAL_NAMES[name]))
    assert back.keys() == state.keys()
    assert all(back[key] is state[key] for key in state)
    make().load_state_dict(back, strict=True)


@pytest.mark.parametrize("make", [tiny_wan, tiny_ltx, tiny_hunyuan_video])
def test_there_and_back_is_the_same_state(make: Callable[[], Any]) -> None:
    """The converter of HunyuanVideo knows one width alone, and the tiny model has another."""
    model = make()
    state, names = model.state_dict(), ORIGINAL_NAMES[type(model).__name__]
    written = original(state, names)
    assert any(key.endswith(names.sign) for key in written)
    assert not any(key.endswith(names.sign) for key in state)
    back = from_original(written, make().state_dict(), names)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_at_its_full_size(name: str) -> None:
    """Every row of every tensor has a number of its own, which diffusers' converter brings back to its place."""
    family = load_leaf("model", name)
    with torch.device("meta"):
        state = getattr(diffusers, family.transformer_class)(**family.transformer_config).state_dict()
    sizes = [value.shape[0] for value in state.values()]
    rows = dict(zip(state, torch.arange(sum(sizes)).split(sizes), strict=True))
    written = original(rows, family.original_names)
    assert not [key for key in written if "condition_embedder" in key or "ffn.net" in key]
    back = CONVERTERS[family.transformer_class](dict(written))
    assert back.keys() == rows.keys()
    assert all(torch.equal(back[key], rows[key]) for key in rows)


def test_some_names() -> None:
    names = original_names(["blocks.0.attn2.to_out.0.bias", "scale_shift_table"], WAN_ORIGINAL_NAMES)
    assert list(names.values()) == ["blocks.0.cross_attn.o.bias", "head.modulation"]
    sources = original_sources(tiny_hunyuan_video().state_dict(), HUNYUAN_VIDEO_ORIGINAL_NAMES)
    single = "single_transformer_blocks.0"
    parts = (f"{single}.attn.to_q", f"{single}.attn.to_k", f"{single}.attn.to_v", f"{single}.proj_mlp")
    assert sources["single_blocks.0.linear1.weight"] == tuple(f"{part}.weight" for part in parts)
    assert "txt_in.individual_token_refiner.blocks.0.self_attn_qkv.bias" in sources


def test_cogvideox_has_none_and_two_equal_names_and_lost_parts_are_refused() -> None:
    assert not hasattr(load_leaf("model", "cogvideox"), "original_names")
    names = OriginalNames(code="X", sign="c.weight", rules=[(r"^[ab]$", "c")])
    with pytest.raises(UserError, match="'b.weight' and 'a.weight' are both 'c.weight'"):
        original_names(["a.weight", "b.weight"], names)
    keys = [f"transformer_blocks.0.attn.to_{part}.weight" for part in "qv"]
    with pytest.raises(
        UserError, match=r"has q, k, v as one tensor 'double_blocks.0.img_attn_qkv.weight'.*nothing for k"
    ):
        original_sources(keys, HUNYUAN_VIDEO_ORIGINAL_NAMES)
