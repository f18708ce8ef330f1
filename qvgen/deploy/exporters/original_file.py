"""One safetensors file with the names of the model's own code: what ComfyUI, LightX2V and DiffSynth-Studio load."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from qvgen.deploy.exporters.base import ExportedModel, ExportFile
from qvgen.models.original_names import original_names

ORIGINAL_FILE = "diffusion_model.safetensors"


def original_file(model: ExportedModel, tensors: Mapping[str, Tensor]) -> ExportFile:
    """The file of tensors that have diffusers' names; the model's family has original names."""
    assert model.names is not None, "checked before anything is made"
    names = original_names(tensors, model.names)
    content = {names[key]: tensor for key, tensor in tensors.items()}
    return ExportFile(path=ORIGINAL_FILE, content=content, metadata={"format": "pt"})
