"""One safetensors file with the names of the model's own code: what ComfyUI, LightX2V and DiffSynth-Studio load.

Layers that this code has as one are joined row by row: weights, scales for each row and biases, exactly. A file of LTX-Video
has the authors' ``config`` in its header, from which ComfyUI takes the sizes: of 4-bit weights it could not tell them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qvgen.deploy.exporters.base import ExportedModel, ExportFile
from qvgen.deploy.exporters.comfy_marker import MARKER
from qvgen.errors import UserError
from qvgen.models.original.tensors import join_original, original_sources

ORIGINAL_FILE = "diffusion_model.safetensors"
SIZES = (
    "in_channels", "out_channels", "num_attention_heads", "attention_head_dim", "num_layers", "cross_attention_dim",
    "caption_channels",
)  # fmt: skip
"""Keys of LTX-Video's configuration that diffusers has too."""


def original_file(model: ExportedModel, tensors: Mapping[str, Tensor]) -> ExportFile:
    """The file of tensors that have diffusers' names; the model's family has original names.

    Raises:
        UserError: Layers that are parts of one are not quantized alike.
    """
    assert model.names is not None, "checked before anything is made"
    content: dict[str, Tensor] = {}
    for whole, keys in original_sources(tensors, model.names).items():
        parts = [tensors[key] for key in keys]
        if whole.endswith(f".{MARKER}"):
            content[whole] = _one_marker(keys, parts)
        else:
            joined = join_original(whole, parts, model.names)
            content |= {whole: joined} if joined is parts[0] else model.spool.keep({whole: joined})
    return ExportFile(path=ORIGINAL_FILE, content=content, metadata={"format": "pt", **_header(model)})


def _one_marker(keys: Sequence[str], markers: Sequence[Tensor]) -> Tensor:
    """The marker that all parts of a layer have."""
    for key, marker in zip(keys, markers, strict=True):
        if not torch.equal(marker, markers[0]):
            raise UserError(
                f"{key!r} says {bytes(marker.tolist()).decode()} and {keys[0]!r} {bytes(markers[0].tolist()).decode()}; the "
                "original code has both layers as one: give them one profile"
            )
    return markers[0]


def _header(model: ExportedModel) -> dict[str, str]:
    """The entry of the header from which the runtimes take sizes, where the authors' own files have one."""
    if model.names is None or model.names.header is None:
        return {}
    config = model.manifest.transformer_config
    sizes = {key: config[key] for key in SIZES if key in config}
    return {"config": json.dumps({"transformer": {**sizes, **model.names.header}})}
