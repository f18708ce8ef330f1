"""A golden file for every format of `qvgen export`: derived in golden_formats.py, kept in golden/, and what qvgen writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qvgen.config.leaf_file import leaf_names
from qvgen.config.leaves import load_leaf
from qvgen.layers.packed_linear import PackedLinear
from qvgen.quant.packing import pack_codes
from tests.deploy.exporters import golden_formats
from tests.deploy.exporters.golden_formats import FORMATS, Entry, golden_text
from tests.deploy.exporters.packed_models import packed_layer

GOLDEN = Path(__file__).parent / "golden"
LAYERS: dict[str, tuple[str, str, int, int]] = {
    "bf16": ("paper", "w3a3", 6, 40),
    "cache_dit": ("svdq_g64", "w4a4", 128, 128),
    "comfy": ("convrot", "w4a4", 6, 64),
    "diffusers": ("paper", "w3a3", 12, 40),
    "humming": ("w4a8_row", "w3a8", 8, 64),
    "int8": ("int8", "w8a8", 6, 40),
    "nunchaku_lite": ("svdq_g64", "w4a4", 128, 128),
    "sdnq": ("paper", "w3a3", 8, 64),
    "torchao": ("paper", "w4a4", 6, 48),
}
"""Profile, bits, rows and columns of the layer in each format."""


def described_layer(target: str) -> PackedLinear:
    """The layer of golden_formats.py, in qvgen."""
    profile, bits, rows, columns = LAYERS[target]
    layer, _ = packed_layer(profile, bits, columns=columns, rows=rows)
    width = layer.profile.weight.bits
    if layer.profile.weight.symmetric:
        codes = torch.tensor(golden_formats.signed(width, rows, columns)) + 2 ** (width - 1)
    else:
        codes = torch.tensor(golden_formats.unsigned(width, rows, columns))
        assert layer.weight_zero_point is not None
        layer.weight_zero_point.copy_(torch.arange(rows) % 2**width)
    for mine, plane in zip(layer.planes, pack_codes(codes.to(torch.uint8), bits=width), strict=True):
        mine.copy_(plane)
    groups = 1 if layer.weight_scale.ndim == 1 else layer.weight_scale.shape[1]
    scales = torch.tensor([[golden_formats.scale(n + group) for group in range(groups)] for n in range(rows)])
    layer.weight_scale.copy_(scales.reshape(layer.weight_scale.shape))
    assert layer.bias is not None
    layer.bias.copy_(torch.tensor([golden_formats.bias(n) for n in range(rows)]))
    if layer.form.table_names(3) != (None, None):
        for name, value in (("clip_low", 0.5), ("clip_high", 0.75)):
            table = getattr(layer, name)
            if table is not None:
                table.fill_(value)
    return layer


def entry(tensor: Tensor) -> Entry:
    """A tensor as a file holds it."""
    whole = tensor.detach().contiguous()
    data = bytes(whole.reshape(-1).view(torch.uint8).tolist())
    return str(whole.dtype).removeprefix("torch."), list(whole.shape), data


def written(target: str) -> dict[str, Any]:
    """What qvgen writes of the layer: the tensors of a target, or those of the packed file itself."""
    layer = described_layer(target)
    return dict(layer.state_dict()) if target == "diffusers" else load_leaf("export", target).tensors(layer)


def test_every_target_has_a_golden_file() -> None:
    # hub writes the files of diffusers, and a model card.
    assert set(FORMATS) == set(LAYERS) == set(leaf_names("export")) - {"hub"}
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(FORMATS)


@pytest.mark.parametrize("target", FORMATS)
def test_the_bytes_of_a_format(target: str) -> None:
    derived = FORMATS[target]()
    assert (GOLDEN / f"{target}.json").read_text() == golden_text(derived)
    found = {name: entry(tensor) for name, tensor in written(target).items()}
    assert found == derived
    assert sum(len(data) for _, _, data in derived.values()) >= 200
