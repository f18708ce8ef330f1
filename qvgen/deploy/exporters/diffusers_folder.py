"""A folder of a diffusers transformer, as ``from_pretrained`` of its class loads it."""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch import Tensor

from qvgen.deploy.exporters.base import DIFFUSERS_WEIGHTS, ExportedModel, ExportFile


def diffusers_folder(model: ExportedModel, tensors: Mapping[str, Tensor], *, below: str = "") -> list[ExportFile]:
    """The two files of a diffusers transformer, in a folder ``below`` that of the export."""
    config = (json.dumps(model.diffusers_config, indent=2) + "\n").encode()
    return [
        ExportFile(path=f"{below}config.json", content=config),
        ExportFile(path=f"{below}{DIFFUSERS_WEIGHTS}", content=tensors, metadata={"format": "pt"}),
    ]
