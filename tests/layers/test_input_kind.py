"""What stands before a Linear, read from the modules of diffusers' classes."""

from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel
from torch import nn

from qvgen.layers.input_kind import input_kinds
from qvgen.layers.swap import quantized_layers, select_linears, swap_fake_quant_
from tests.profiles import make_profile


def wan() -> nn.Module:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "text_dim": 32, "num_layers": 2}
    return WanTransformer3DModel(**sizes)


def cogvideox() -> nn.Module:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "text_embed_dim": 32, "time_embed_dim": 32}
    return CogVideoXTransformer3DModel(**sizes, num_layers=2)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (wan, {
            "condition_embedder.time_embedder.linear_1": "bounded", "condition_embedder.time_embedder.linear_2": "silu",
            "condition_embedder.time_proj": "silu", "condition_embedder.text_embedder.linear_2": "gelu",
            "blocks.0.ffn.net.2": "gelu", "blocks.1.ffn.net.2": "gelu",
        }),
        (cogvideox, {
            "time_embedding.linear_1": "bounded", "time_embedding.linear_2": "silu", "norm_out.linear": "silu",
            **{f"transformer_blocks.{i}.{name}": kind for i in range(2)
               for name, kind in (("norm1.linear", "silu"), ("norm2.linear", "silu"), ("ff.net.2", "gelu"))},
        }),
    ],
)  # fmt: skip
def test_kinds_of_the_families(make, expected) -> None:
    with torch.device("meta"):
        model = make()
    names = select_linears(model, include=["*"], exclude=[]).quantized
    kinds = input_kinds(model, names)
    assert {name: kind for name, kind in kinds.items() if kind != "gaussian"} == expected
    assert set(kinds) == set(names)


def test_a_gate_or_a_norm_in_between_makes_no_claim() -> None:
    class SwiGLU(nn.Linear):
        """As diffusers names it: a product of two halves."""

    gated = nn.Sequential(SwiGLU(4, 4), nn.Dropout(0.0), nn.Linear(4, 4))
    normed = nn.Sequential(nn.SiLU(), nn.LayerNorm(4), nn.Linear(4, 4))
    plain = nn.Sequential(nn.GELU(), nn.Dropout(0.0), nn.Linear(4, 4))
    for model, kind in ((gated, "gaussian"), (normed, "gaussian"), (plain, "gelu")):
        assert input_kinds(model, ["2"]) == {"2": kind}


@pytest.mark.parametrize(("rotation", "last"), [(0, 0.92), (16, 0.79)])
def test_layers_start_by_their_kind_and_a_rotation_makes_all_gaussian(rotation: int, last: float) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act, self.last = nn.Linear(1024, 1024), nn.SiLU(), nn.Linear(1024, 16)

        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            del timestep
            return self.last(self.act(self.first(x)))

    model = Model()
    made = make_profile("paper", activation_bits=4).with_rotation(rotation)
    swap_fake_quant_(model, names=["first", "last"], profile=made, num_noise_bands=2)
    for name, share in (("first", 0.79), ("last", last)):
        for table in quantized_layers(model)[name].activation_quantizer.tables():
            assert table.tolist() == pytest.approx([share, share])
