"""Trained models whose q, k and v share a quantizer: their packed form merges them, and gives the trained model's bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import qvgen
from qvgen.config.leaves import load_leaf
from qvgen.deploy.packed_fusion import fuse_packed_
from qvgen.layers.shared_input import share_activations_, shared_input_sets
from qvgen.layers.swap import add_switch_widths_, quantized_layers
from tests.deploy.test_packed_fusion import MODELS, call, make_fake


def trained(name: str, *, shared: bool, switch: bool = False) -> nn.Module:
    """A few optimizer steps, until the clips of every layer differ from band to band."""
    model: Any = make_fake(name).requires_grad_(True)
    if switch:
        add_switch_widths_(model, (4, 8))
    layers = quantized_layers(model)
    if shared:
        share_activations_(layers, shared_input_sets(layers, load_leaf("model", name).shared_inputs))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    x = torch.randn((4, 4, 2, 8, 8) if name == "wan" else (4, 2, 4, 16, 16), generator=torch.Generator().manual_seed(2))
    text = torch.randn(4, 8, 24, generator=torch.Generator().manual_seed(3))
    timestep = torch.tensor([100.0, 900.0, 500.0, 300.0])
    for _ in range(3):
        y = model(hidden_states=x, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer in layers.values():
        assert len(set(layer.activation_quantizer.clip_high.tolist())) > 1
    return model.requires_grad_(False)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shared", [True, False])
def test_a_trained_model_is_merged_if_its_layers_share(name: str, shared: bool, tmp_path) -> None:
    fake = trained(name, shared=shared)
    wanted = call(name, fake)
    packed = copy.deepcopy(fake)
    qvgen.fold(packed)
    qvgen.save_packed(packed, tmp_path)
    a_block = MODELS[name][2] + (1 if name == "wan" else 0)  # q, k, v and, for Wan, k and v of the text
    assert fuse_packed_(packed).merged == (2 * a_block if shared else 0)
    assert torch.equal(call(name, packed), wanted)
    assert torch.equal(call(name, qvgen.load_packed(tmp_path)), wanted)


@pytest.mark.parametrize("name", MODELS)
def test_a_shared_model_with_a_policy_gives_the_same_bits_at_both_widths(name: str) -> None:
    fake = trained(name, shared=True, switch=True)
    packed = copy.deepcopy(fake)
    qvgen.fold(packed)
    fuse_packed_(packed)
    for bits in (4, 8):
        for model in (fake, packed):
            for module in model.modules():
                if hasattr(module, "noise_band"):
                    module.noise_band.policy_bits = (bits,) * 2
        assert torch.equal(call(name, packed), call(name, fake))
