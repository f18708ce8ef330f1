"""CogVideoX's manifests: what its class computes from numbers is bounded by the file; its sizes are the file's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

import qvgen
from qvgen.config.leaves import load_leaf
from qvgen.deploy.checkpoint import check_packed, load_packed, save_packed
from qvgen.initializers.prepare import PrepareConfig
from tests.profiles import make_profile


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed CogVideoX-2b of two blocks of width 32, whose positions are computed."""
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=16, text_embed_dim=16,
        num_layers=2, sample_height=4, sample_width=6, sample_frames=9,
    )  # fmt: skip
    profile = make_profile("paper", weight_bits=4, activation_bits=4)
    qvgen.prepare(model, PrepareConfig(profile=profile, initializer=load_leaf("init", "rtn"), include=["*.attn1.to_q"]))
    qvgen.fold(model)
    folder = tmp_path_factory.mktemp("cogvideox") / "packed"
    save_packed(model, folder)
    return folder


def test_it_loads_with_its_positions(whole: Path) -> None:
    assert check_packed(whole).transformer_config["sample_frames"] == 9
    model: Any = load_packed(whole, kernel="reference")
    assert model.patch_embed.pos_embedding.shape == (1, 226 + 2 * 3 * 3, 32)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sample_width", 2**20, "asks for tables of .* bytes .patch_embed.pos_embedding., more than the"),
        ("sample_frames", 10**9, "asks for tables of|builds no CogVideoXTransformer3DModel"),
        ("sample_height", 2**62, "builds no CogVideoXTransformer3DModel"),
        ("max_text_seq_length", 2**40, "asks for tables of"),
        ("patch_size", 0, "base.config.patch_size=0 is no whole number from 1"),
        ("temporal_compression_ratio", 0, "base.config.temporal_compression_ratio=0 is no whole number from 1"),
        ("spatial_interpolation_scale", 0.0, "base.config.spatial_interpolation_scale=0.0 is not above 0"),
        ("use_learned_positional_embeddings", True, "builds no CogVideoXTransformer3DModel: There are no CogVideoX"),
        ("num_layers", 10**6, "blocks of .* tensors are more than the"),
        ("num_layers", 1, "'transformer_blocks.1.attn1.to_q', which CogVideoXTransformer3DModel does not have"),
        ("attention_head_dim", 15, "shape|builds no"),
        ("activation_fn", "nonsense", "builds no CogVideoXTransformer3DModel"),
        ("dropout", 7.0, "builds no CogVideoXTransformer3DModel"),
        ("norm_eps", "small", "base.config.norm_eps='small' is no finite number"),
    ],
)
def test_what_the_configuration_asks_for_is_bounded(
    whole: Path, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    packed = Path(shutil.copytree(whole, tmp_path / "packed"))
    content = json.loads((packed / "manifest.json").read_text())
    content["base"]["config"][key] = value
    (packed / "manifest.json").write_text(json.dumps(content))
    for read in (load_packed, check_packed):
        with pytest.raises(ValueError, match=message) as caught:
            read(packed)
        assert str(caught.value).startswith(str(packed))
        assert len(str(caught.value).splitlines()) == 1
