"""Packed checkpoints of tiny models, and single packed layers, for the tests of exporters."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoTransformer3DModel,
    LatteTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

import qvgen
from qvgen.config.bits import Bits
from qvgen.config.leaves import load_leaf, load_profile
from qvgen.deploy.fixed_inputs import fixed_inputs
from qvgen.initializers.mse import MeanSquaredError
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.noise_band import NoiseBand
from qvgen.layers.packed_linear import PackedLinear


def tiny_wan() -> nn.Module:
    """One block of width 128, weights from a fixed seed."""
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, text_dim=32, freq_dim=32,
        ffn_dim=256, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip


def tiny_cogvideox() -> nn.Module:
    """One block of width 128, with rotary positions."""
    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, time_embed_dim=128,
        text_embed_dim=32, num_layers=1, max_text_seq_length=8, use_rotary_positional_embeddings=True,
    )  # fmt: skip


def tiny_ltx() -> nn.Module:
    """One block of width 128."""
    torch.manual_seed(0)
    return LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=64, cross_attention_dim=128, num_layers=1,
        caption_channels=32,
    )  # fmt: skip


def tiny_hunyuan_video() -> nn.Module:
    """One block of two streams, one of a single one and a refiner of one block, of width 128."""
    torch.manual_seed(0)
    return HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=64, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=32, pooled_projection_dim=32, rope_axes_dim=(16, 24, 24),
    )  # fmt: skip


def tiny_hunyuan_video15() -> nn.Module:
    """One block of two streams and a refiner of one block, of width 128."""
    torch.manual_seed(0)
    return HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=64, num_layers=1, num_refiner_layers=1,
        text_embed_dim=32, text_embed_2_dim=32, image_embed_dim=32, rope_axes_dim=(16, 24, 24), task_type="t2v",
    )  # fmt: skip


def tiny_latte() -> nn.Module:
    """One block in space and one in time, of width 128."""
    torch.manual_seed(0)
    return LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=1, cross_attention_dim=128,
        caption_channels=32, sample_size=8, patch_size=2, attention_bias=True, video_length=2, norm_type="ada_norm_single",
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_elementwise_affine=False,
    )  # fmt: skip


def tiny_mochi() -> nn.Module:
    """Two blocks, of which the last one has no feed-forward of the text, of widths that have multiples of 128 everywhere."""
    torch.manual_seed(0)
    return MochiTransformer3DModel(
        patch_size=2, num_attention_heads=6, attention_head_dim=64, num_layers=2, pooled_projection_dim=384, in_channels=4,
        text_embed_dim=32, time_embed_dim=32,
    )  # fmt: skip


def save(
    model: nn.Module, folder: Path, *, profile: str, bits: str, init: Any = "rtn", name: str = "wan", narrow: str = ""
) -> Path:
    """The folder of a model whose blocks are quantized, folded and saved as one of a family; one layer with 3-bit weights."""

    def calibrate(full: nn.Module) -> object:
        inputs = fixed_inputs(full, timestep=500.0)
        assert inputs is not None
        return full(**inputs)

    qvgen.prepare(model, bits=bits, profile=profile, init=init, calibrate=calibrate)
    if narrow:
        layer = model.get_submodule(narrow)
        assert isinstance(layer, FakeQuantLinear)
        weight = replace(layer.profile.weight, bits=3)
        layer.declare_(profile=replace(layer.profile, weight=weight), input_scale=None)
        MeanSquaredError().initialize_(layer, statistics=None)
    qvgen.fold(model)
    qvgen.save_packed(model, folder, base_name=name)
    return folder


@functools.cache
def svdquant(rank: int) -> Any:
    """The PTQ method with smoothing and a branch."""
    return load_leaf("init", "svdquant", rank=rank)


def packed_layer(
    profile: str, bits: str, *, columns: int, rows: int, weight_zero_point: Any = None, scale_dtype: Any = None
) -> tuple[PackedLinear, Tensor]:
    """A layer of random weights under a profile, and inputs [1, 32, K] with a loud channel."""
    generator = torch.Generator().manual_seed(columns)
    linear = nn.Linear(columns, rows)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(rows, columns, generator=generator) * 0.05)
        linear.bias.copy_(torch.randn(rows, generator=generator))
    band = NoiseBand(1)
    band.set_timestep(torch.tensor([500.0]))
    grids = load_profile(profile, Bits.parse(bits)).fitted([columns])
    if weight_zero_point is not None:
        grids = replace(grids, weight=replace(grids.weight, zero_point=weight_zero_point))
    if scale_dtype is not None:
        sides = (replace(grid, scale_dtype=scale_dtype) for grid in (grids.weight, grids.activation))
        grids = replace(grids, **dict(zip(("weight", "activation"), sides, strict=True)))
    layer = FakeQuantLinear(linear, profile=grids, noise_band=band)
    MeanSquaredError().initialize_(layer, statistics=None)
    x = torch.randn(1, 32, columns, generator=generator)
    x[..., 3] *= 10
    return PackedLinear.from_fake_quant(layer, kernel="reference"), x
