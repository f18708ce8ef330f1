"""Whole packed blocks on the Triton kernels, fused, in Triton's interpreter: the bits of single layers on the reference."""

from __future__ import annotations

import pytest
import torch

from qvgen.deploy.packed_fusion import fuse_packed_, kernel_names, prepack_
from qvgen.layers.swap import packed_layers
from qvgen_kernels import get_backend
from tests.deploy import test_packed_fusion
from tests.deploy.test_packed_fusion import MODELS, call, fuse_as_elsewhere, make_fake, make_packed
from tests.kernels.triton_interpreter import _quiet_numpy

__all__ = ["_quiet_numpy"]


@pytest.mark.parametrize("name", MODELS)
def test_fused_blocks_on_triton_give_the_bits_of_single_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model_class, config, merged = MODELS[name]
    monkeypatch.setitem(test_packed_fusion.MODELS, name, (model_class, config | {"num_layers": 1}, merged))
    fake = make_fake(name)
    plain, fused = make_packed(name, fake), make_packed(name, fake)
    for layer in packed_layers(fused).values():
        layer.kernel = "triton"
    for layer in packed_layers(plain).values():
        layer.kernel = "reference"
    monkeypatch.setattr(get_backend("triton"), "refusal", lambda spec, *, device: None)
    fuse_as_elsewhere(monkeypatch)
    assert fuse_packed_(fused).gated == 1
    plain, fused = plain.to(torch.bfloat16), fused.to(torch.bfloat16)
    prepack_(fused)
    assert kernel_names(fused) == ("triton",)
    assert torch.equal(call(name, fused, torch.bfloat16), call(name, plain, torch.bfloat16))
