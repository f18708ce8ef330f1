"""From ``model.path`` to a folder in the hub's layout, or a true answer about what lies there instead.

    FOLDER with model_index.json      itself
    ORG/NAME                          its snapshot in the hub's cache on this machine (a folder of that name comes first)
    a cache's root, models--ORG--NAME the snapshot in it

Nothing is downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qvgen.models.folder.hub_cache import (
    cache_of,
    cache_root,
    cached_repositories,
    cached_snapshot,
    is_repository,
    snapshot_below,
)
from qvgen.models.folder.published import known_models
from qvgen.models.folder.safetensors_header import read_header
from qvgen.models.folder.weight_set import PICKLES, quantized_already

INDEX = "model_index.json"
_WAN_FILES = (
    "Wan2.1_VAE.pth",
    "Wan2.2_VAE.pth",
    "models_t5_umt5-xxl-enc-bf16.pth",
    "high_noise_model",
    "low_noise_model",
)
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def find_model_folder(path: str | Path, *, repository: str, download: str) -> Path:
    """Find the model's folder.

    Args:
        path: The value of ``model.path``.
        repository: ORG/NAME of the model on the hub; which one a cache's root stands for.
        download: how to get a folder from the hub; the end of a message where nothing else helps.

    Returns:
        A folder that holds model_index.json.

    Raises:
        ValueError: there is none; the message says what is there and what to do.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        raise ValueError(f"model.path={path} is a file: {_file_answer(folder, download=download)}")
    if not folder.is_dir():
        return _cached(str(path), repository=repository, download=download)
    model_folder = folder if (folder / INDEX).is_file() else snapshot_below(folder, repository=repository)
    if model_folder is None or not (model_folder / INDEX).is_file():
        raise ValueError(f"model.path={path} {_folder_answer(model_folder or folder, repository, download=download)}")
    return model_folder


def _cached(path: str, *, repository: str, download: str) -> Path:
    """The snapshot of ORG/NAME; raises ValueError without one."""
    if not is_repository(path):
        raise ValueError(f"model.path={path} is not there; {download}")
    snapshot = cached_snapshot(path)
    if snapshot is None:
        own = f"download it with `hf download {path}`, or write the folder where it lies"
        other = f"{download}; if {path} is a repository of the hub, `hf download {path}` puts it there"
        raise ValueError(
            f"model.path={path} is no folder, and the hub's cache {cache_root()} holds no such repository; "
            f"{own if path == repository else other}"
        )
    if not (snapshot / INDEX).is_file():
        raise ValueError(f"model.path={path} in the hub's cache {_folder_answer(snapshot, path, download=download)}")
    return snapshot


def _file_answer(file: Path, *, download: str) -> str:
    """A phrase that says what kind of file was given for a folder."""
    name = file.name
    if name.endswith(".gguf"):
        return f"GGUF, whose weights are quantized already; {download}"
    if name.endswith(PICKLES):
        return f"a pickle, which runs code when it is read and never is; {download}"
    if name == INDEX or (name.endswith(".json") and (file.parent / INDEX).is_file()):
        return f"write its folder, model.path={file.parent}"
    if not name.endswith(".safetensors"):
        return f"needed is a folder in the hub's layout; {download}"
    try:
        _, entries = read_header(file)
    except ValueError as error:
        return f"it {error}; {download}"
    if (file.parent.parent / INDEX).is_file():
        return f"write the model's folder, model.path={file.parent.parent}"
    return _weights_answer(file, entries, download=download)


def _weights_answer(file: Path, entries: dict[str, dict[str, Any]], *, download: str) -> str:
    """A phrase that says what kind of weights one file holds."""
    if any("lora" in name for name in entries):
        return f"a LoRA; write model.lora={file} beside the model's own folder"
    if reason := quantized_already(entries):
        return f"it {reason}; {download}"
    names = {name.removeprefix(next((p for p in _PREFIXES if name.startswith(p)), "")) for name in entries}
    if any(name.endswith("blocks.0.self_attn.q.weight") for name in names):
        return f"one file in Wan's original layout; {_beside(file, download)}"
    if any(name.startswith(("blocks.0.attn1.", "transformer_blocks.0.attn1.")) for name in names):
        return f"a transformer alone, without VAE, text encoder and configurations; {_beside(file, download)}"
    return f"weights alone ({min(names, default='nothing')}); needed is a folder in the hub's layout; {download}"


def _beside(finetune: Path, download: str) -> str:
    """The command for a transformer alone."""
    return f"write model.transformer={finetune} beside the base model, whose folder is model.path; {download}"


def _folder_answer(folder: Path, repository: str, *, download: str) -> str:
    """A clause, to follow on its name, that says what kind of folder it is that holds no model_index.json."""
    names = {entry.name for entry in folder.iterdir()}
    config, manifest = _json(folder / "config.json"), _json(folder / "manifest.json")
    named = str(config.get("_class_name"))
    weights = sorted(folder.glob("*.safetensors"))
    if manifest.get("format") == "qvgen-packed":
        return f"is a packed model; write packed={folder} instead"
    if (folder / "model" / INDEX).is_file():
        return f"is the run of a training; write model.path={folder / 'model'}"
    if (folder / "packed" / "manifest.json").is_file():
        return f"is the run of a training, whose packed model is packed={folder / 'packed'}; {download}"
    if "adapter_config.json" in names or "pytorch_lora_weights.safetensors" in names:
        return f"is a LoRA; write model.lora={folder} beside the model's own folder"
    if names & set(_WAN_FILES) or named == "WanModel":
        return f"is in Wan's original layout, and diffusers' layout is needed; {download}"
    if "mp_rank_00_model_states.pt" in {path.name for path in folder.glob("**/*.pt")}:
        return f"is in CogVideoX's original layout (SAT), and diffusers' layout is needed; {download}"
    if reason := _header_reason(weights[:1]):
        return f"holds {weights[0].name}, which {reason}; {download}"
    if named.endswith("Transformer3DModel"):
        if (folder.parent / INDEX).is_file():
            return f"holds a transformer alone; its model is the folder above, write model.path={folder.parent}"
        return (
            f"holds a transformer alone ({named}), without VAE, text encoder and tokenizer; {_beside(folder, download)}"
        )
    if name := _model_of_own_class(_json(folder / "transformer" / "config.json")):
        return f"holds a transformer of another model; use model={name}"
    if (folder / "transformer" / "config.json").is_file():
        place = "" if cache_of(folder) else f" --local-dir {folder}"
        return f"lacks {INDEX}; get it with `hf download {repository} {INDEX}{place}`"
    if cached := cached_repositories(folder):
        return f"is the hub's cache and does not hold {repository} (but {', '.join(cached[:3])}); {download}"
    if weights:
        return f"holds {weights[0].name}: {_file_answer(weights[0], download=download)}"
    for suffixes, what in (((".gguf",), "GGUF, quantized already"), (PICKLES, "pickles, which are never read")):
        if given := sorted(name for name in names if name.endswith(suffixes)):
            return f"holds {given[0]} alone ({what}); {download}"
    return f"holds no {INDEX}; {download}"


def _model_of_own_class(config: dict[str, Any]) -> str | None:
    """The model whose transformer is a class of qvgen, by a transformer's configuration; its folders have no index."""
    names = {config.get("_class_name"), *(config.get("architectures") or ())}
    return next((m.name for m in known_models() if names & m.own_classes.keys()), None)


def _header_reason(files: list[Path]) -> str | None:
    """Why weights can't be used by what their header says."""
    for file in files:
        try:
            return quantized_already(read_header(file)[1])
        except (OSError, ValueError):
            return None
    return None


def _json(file: Path) -> dict[str, Any]:
    """The mapping that a JSON file holds; an empty one where it holds none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
