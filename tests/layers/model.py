"""A small transformer-like module, and layers made from it, for the tests of this folder."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from qvgen.initializers.prepare import PrepareConfig, prepare
from qvgen.initializers.rtn import RoundToNearest
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.noise_band import NoiseBand
from qvgen.quant.affine import choose_qparams
from tests.profiles import COLUMNS, make_profile

BANDS = 5
TIMESTEPS = torch.tensor([10.0, 950.0, 430.0])
"""Of three samples, in three different bands."""


class Block(nn.Module):
    """Two Linears on tokens [B, T, K] and one on a condition [B, K]: both layouts that a DiT's Linears see."""

    def __init__(self, width=COLUMNS):
        super().__init__()
        self.modulation = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, tokens, condition):
        tokens = tokens * (1 + 0.1 * self.modulation(condition).unsqueeze(1))
        return tokens + self.down(self.up(tokens).relu())


class Model(nn.Module):
    """Blocks under a timestep argument, and an output projection."""

    def __init__(self, width=COLUMNS, num_blocks=2):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))
        self.output = nn.Linear(width, 8)

    def forward(self, tokens, condition, timestep):
        """Map tokens [B, T, K], condition [B, K] and timestep [B] (or a scalar) to [B, T, 8]."""
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self.output(tokens)


def make_model(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Model(**options).eval()


def prepared_model(profile, *, phi_rank=0, seed=0, **options):
    """A prepared model whose clips differ from band to band."""
    model = make_model(seed)
    prepare(
        model,
        PrepareConfig(
            profile=profile, initializer=RoundToNearest(), num_noise_bands=BANDS, phi_rank=phi_rank, **options
        ),
    )
    for module in model.modules():
        if isinstance(module, FakeQuantLinear):
            spread_clips_(module, seed)
    return model


def spread_clips_(layer, seed):
    """Give every noise band clips of its own, between 0.7 and 0.98."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for table in (layer.activation_quantizer.clip_low, layer.activation_quantizer.clip_high):
            if table is not None:
                table.copy_(torch.rand(table.shape, generator=generator) * 3 + 0.9)


def make_inputs(samples=3, tokens=4, seed=0):
    """Tokens, condition and timesteps of three different noise bands."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, tokens, COLUMNS, generator=generator)
    x[..., 5] *= 6
    timestep = torch.tensor([10.0, 950.0, 430.0, 650.0])[:samples]
    return x, torch.randn(samples, COLUMNS, generator=generator), timestep


def make_rows(seed=0, tokens=4, columns=COLUMNS):
    """Inputs of a layer for three samples, float32 [3, tokens, K], with an outlier channel."""
    x = torch.randn(3, tokens, columns, generator=torch.Generator().manual_seed(seed + 1000))
    x[..., 3] *= 5
    return x


def make_layer(
    name="paper",
    *,
    weight_bits=3,
    activation_bits=3,
    rotation=None,
    phi_rank=0,
    out_features=6,
    bias=True,
    seed=0,
    columns=COLUMNS,
):
    """A layer whose weight range is learned a little away from minimum and maximum, with clips by band.

    ``rotation`` takes the place of the profile's.
    """
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(columns, out_features, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * 0.1)
        if bias:
            linear.bias.copy_(torch.randn(out_features, generator=generator))
    profile = make_profile(name, weight_bits=weight_bits, activation_bits=activation_bits)
    profile = profile if rotation is None else replace(profile, rotation=rotation)
    layer = FakeQuantLinear(linear, profile=profile, noise_band=NoiseBand(BANDS), phi_rank=phi_rank)
    scale, zero = choose_qparams(layer.weight.detach(), grid=profile.weight)
    shift = 0.2 if profile.weight.zero_point == "integer" else 0.37
    layer.weight_quantizer.start_from_(scale * 0.87, zero + shift)
    layer.start_phi_(generator=generator)
    spread_clips_(layer, seed)
    return layer


def grid_side(profile):
    """The oracle's description of a profile, as keyword arguments of oracles.LayerForm."""
    return {
        "weight_bits": profile.weight.bits,
        "weight_kind": profile.weight.zero_point,
        "activation_bits": profile.activation.bits,
        "activation_kind": profile.activation.zero_point,
        "group": profile.weight.group_size or 0,
        "scale_dtype": profile.activation.scale_dtype,
        "weight_scale_dtype": profile.weight.scale_dtype,
        "rotation": profile.rotation,
        "rotation_kind": profile.rotation_kind,
        "arithmetic": profile.activation.arithmetic,
    }
