"""The identity of a model's folder: a checksum of all bytes of each part, whatever the folder is called.

    transformer, vae, text_encoder    config.json and weights, of an image encoder likewise; see
                                      :meth:`qvgen.models.folder.hub_folder.HubFolder.checksum`
    tokenizer, scheduler              all files; of further text encoders and an image processor likewise
    model_index                       model_index.json but for the keys that begin with ``_`` (versions, where it came from)

A part that is not there is left out. README, licences and pictures are no part of the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from qvgen.models.folder.hub_folder import HubFolder


def weights_identity(folder: HubFolder, components: Iterable[str]) -> dict[str, str]:
    """Component -> checksum, for those that have weights here; all weights are read once."""
    present = [name for name in components if any((folder.path / name).glob("*.safetensors"))]
    return {name: folder.checksum(name) for name in present}


def settings_identity(folder: HubFolder) -> dict[str, str]:
    """Checksum of each part without weights (tokenizers, image processor, scheduler), and of the list of parts."""
    present = [
        name
        for name in ("tokenizer", "tokenizer_2", "image_processor", "feature_extractor", "scheduler", "guider")
        if any((folder.path / name).glob("*"))
    ]
    checksums = {name: folder.files_revision(name) for name in present}
    if (folder.path / "model_index.json").is_file():
        index = {key: value for key, value in folder.read_json("model_index.json").items() if not key.startswith("_")}
        checksums["model_index"] = hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
    return checksums
