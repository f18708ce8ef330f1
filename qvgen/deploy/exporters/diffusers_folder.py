"""A folder of a diffusers transformer, as ``from_pretrained`` of its class loads it.

config.json
diffusion_pytorch_model.safetensors                       one file, or beyond SHARD_BYTES
diffusion_pytorch_model-00001-of-00002.safetensors, ...   shards, and diffusion_pytorch_model.safetensors.index.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from qvgen.deploy.exporters.base import DIFFUSERS_WEIGHTS, ExportedModel, ExportFile

SHARD_BYTES = 10 * 10**9
"""Most bytes of a file of weights, as diffusers' own ``save_pretrained`` has it."""


def diffusers_folder(
    model: ExportedModel,
    tensors: Mapping[str, Tensor],
    *,
    below: str = "",
    quantization: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[ExportFile]:
    """The files of a diffusers transformer, config.json first.

    Args:
        model: What is exported.
        tensors: All of its tensors.
        below: Folder in that of the export, with a slash at the end.
        quantization: What config.json has under "quantization_config"; None: an ordinary model.
        metadata: Further texts in the header of the weights, which speak of all tensors and so keep them in one file.
        shard_bytes: Most bytes of a file; a tensor that is larger has a file of its own.
    """
    config = {**model.diffusers_config, **({} if quantization is None else {"quantization_config": quantization})}
    plan = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=DIFFUSERS_WEIGHTS.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=shard_bytes if metadata is None else sum(tensor.nbytes for tensor in tensors.values()),
    )
    files = [ExportFile(path=f"{below}config.json", content=(json.dumps(config, indent=2) + "\n").encode())]
    texts = {"format": "pt", **(metadata or {})}
    for name, keys in plan.filename_to_tensors.items():
        content = {key: tensors[key] for key in keys}
        files.append(ExportFile(path=f"{below}{name}", content=content, metadata=texts))
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        files.append(ExportFile(path=f"{below}{DIFFUSERS_WEIGHTS}.index.json", content=text.encode()))
    return files
