"""The parts of a whole pipeline beside a packed transformer: a copy of the base model's folder without its own transformer.

    model_index.json        the pipeline and its parts
    vae/ text_encoder/ ...  as the base folder has them
    LICENSE, NOTICE         the base model's, if they are there

Copied are the files of the parts that model_index.json names and no others: no pickles, no second set of weights, and no path
of the machine on which they were saved.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qvgen.deploy.exporters.base import ExportFile
from qvgen.deploy.manifest import Manifest
from qvgen.errors import UserError
from qvgen.models.folder.hub_folder import HubFolder
from qvgen.models.folder.weight_set import PICKLES, find_weights
from qvgen.models.wan import EXPERT_FOLDERS

INDEX = "model_index.json"
_PATH_KEY = "_name_or_path"
"""Note of diffusers and transformers of the place that a part was loaded from."""
_OTHER_WEIGHTS = (*PICKLES, ".gguf", ".h5", ".msgpack", ".onnx")


def packed_component(base: HubFolder, manifest: Manifest) -> str:
    """Name of the part that the packed transformer stands for.

    Raises:
        UserError: The base folder has no transformer of its class, or one of another configuration.
    """
    parts = _parts(base)
    found = [name for name, kind in parts.items() if kind == manifest.transformer]
    expert = EXPERT_FOLDERS.get(str(manifest.base_arguments.get("expert")))
    if len(found) > 1:
        found = [name for name in found if name == expert]
    if len(found) != 1:
        raise UserError(
            f"export.base={base.path} has no {manifest.transformer} that the packed model could stand for (parts: "
            f"{', '.join(parts)}); give the folder of the model that was packed"
        )
    config = base.read_json(f"{found[0]}/config.json")
    other = {key: value for key, value in manifest.transformer_config.items() if key in config and config[key] != value}
    for key, value in other.items():
        raise UserError(
            f"export.base={base.path} is of another model: its {found[0]} has {key}={config[key]}, the packed one "
            f"{key}={value}"
        )
    return found[0]


def pipeline_files(base: HubFolder, *, without: str) -> Iterator[ExportFile]:
    """Files of all parts but one, of model_index.json, and of the licence.

    Raises:
        ValueError: A part is not there, or its weights are not whole.
    """
    yield _without_paths(base, INDEX)
    for path in sorted(base.path.iterdir()):
        if path.is_file() and path.stem.upper() in ("LICENSE", "LICENCE", "NOTICE"):
            yield ExportFile(path=path.name, content=path)
    for part in _parts(base):
        if part != without:
            yield from _part_files(base, part)


def _parts(base: HubFolder) -> dict[str, str]:
    """Name of each part -> its class; those that the model does without are left out."""
    index = base.read_json(INDEX)
    named = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    return {name: str(value[1]) for name, value in named.items() if value[0] and value[1]}


def _part_files(base: HubFolder, part: str) -> Iterator[ExportFile]:
    folder = base.path / part
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_hidden(path.relative_to(folder))]
    if not files:
        raise UserError(f"{folder} is missing; {base.remedy(f'{part}/*')}")
    weights = _weights(base, part)
    for path in files:
        name = f"{part}/{path.relative_to(folder)}"
        if path.suffix in _OTHER_WEIGHTS or any(f"{suffix}.index" in path.name for suffix in _OTHER_WEIGHTS):
            continue
        if weights is not None and path.suffix == ".safetensors" and path not in weights:
            continue
        yield _without_paths(base, name) if path.name == "config.json" else ExportFile(path=name, content=path)


def _weights(base: HubFolder, part: str) -> tuple[Path, ...] | None:
    """Files of a part's weights; None for a part without any, and for one that is packed itself."""
    folder = base.path / part
    if not (folder / "config.json").is_file() or "quantization_config" in base.read_json(f"{part}/config.json"):
        return None
    try:
        return find_weights(folder).files
    except ValueError as error:
        raise UserError(f"{folder} {error}; {base.remedy(f'{part}/*')}") from error


def _is_hidden(path: Path) -> bool:
    return any(name.startswith(".") for name in path.parts)


def _without_paths(base: HubFolder, name: str) -> ExportFile:
    """A JSON file without notes of where it was loaded from; the file itself where there is none."""
    content = base.read_json(name)
    plain = _plain(content)
    if plain == content:
        return ExportFile(path=name, content=base.path / name)
    return ExportFile(path=name, content=(json.dumps(plain, indent=2) + "\n").encode())


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if key != _PATH_KEY}
    return value
