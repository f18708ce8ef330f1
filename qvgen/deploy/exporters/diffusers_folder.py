"""A folder of a diffusers transformer, as ``from_pretrained`` of its class loads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qvgen.deploy.exporters.base import DIFFUSERS_WEIGHTS, ExportedModel, ExportFile


def diffusers_folder(
    model: ExportedModel,
    tensors: Mapping[str, Tensor],
    *,
    below: str = "",
    quantization: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> list[ExportFile]:
    """The two files of a diffusers transformer.

    Args:
        model: What is exported.
        tensors: All of its tensors.
        below: Folder in that of the export, with a slash at the end.
        quantization: What config.json has under "quantization_config"; None: an ordinary model.
        metadata: Further texts in the header of the weights.
    """
    config = {**model.diffusers_config, **({} if quantization is None else {"quantization_config": quantization})}
    return [
        ExportFile(path=f"{below}config.json", content=(json.dumps(config, indent=2) + "\n").encode()),
        ExportFile(path=f"{below}{DIFFUSERS_WEIGHTS}", content=tensors, metadata={"format": "pt", **(metadata or {})}),
    ]
