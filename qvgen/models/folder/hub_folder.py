"""A diffusers model in a local folder, as the hub lays it out. Nothing is downloaded, unpickled or executed from it.

    FOLDER/model_index.json
    FOLDER/{transformer,vae,text_encoder}/config.json and *.safetensors
    FOLDER/tokenizer/...    FOLDER/scheduler/scheduler_config.json

Revision of a component: sha256 over its config.json and, of every safetensors file in order of name, the header (names,
dtypes and shapes of all tensors) and the first 4 KiB of each tensor. It takes milliseconds and reads a few MiB of 28 GB of
weights, does not depend on where the folder lies or when it was written, and differs for every finetune; it is no
protection against forgery.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import nn

from qvgen.checksum import files_checksum
from qvgen.models.folder.finite_weights import check_finite_weights
from qvgen.models.folder.foreign_code import check_config, check_model_index
from qvgen.models.folder.hub_cache import cache_of, cache_root, cached_snapshot
from qvgen.models.folder.model_path import find_model_folder
from qvgen.models.folder.safetensors_header import first_bytes, read_header
from qvgen.models.folder.tokenizer_folder import check_tokenizer, load_tokenizer
from qvgen.models.folder.weight_set import PICKLES, MissingWeightsError, WeightSet, check_headers, find_weights

log = logging.getLogger(__name__)

_BYTES_PER_TENSOR = 4096
_NAMED_CONFIGS = ("scheduler", "guider")
_CONFIG_FILES = ("config.json", *(f"{name}_config.json" for name in ("tokenizer", "preprocessor", *_NAMED_CONFIGS)))
_FILE_SUFFIXES = (".safetensors", ".gguf", ".json", ".zip", *PICKLES)


@dataclass(frozen=True, kw_only=True)
class HubFolder:
    """One model's folder.

    Attributes:
        path: the folder, which holds model_index.json.
        repository: ORG/NAME on the hub, for messages.
        model: name of the model's configuration, for messages.

    Raises:
        ValueError: its configurations name code, or one of them can't be read.
    """

    path: Path
    repository: str
    model: str

    def __post_init__(self) -> None:
        self.read_json("model_index.json")
        for file in sorted(file for name in _CONFIG_FILES for file in self.path.glob(f"[!.]*/{name}")):
            self.read_json(f"{file.parent.name}/{file.name}")

    @classmethod
    def find(cls, path: str | Path, *, repository: str, model: str) -> Self:
        """The folder that ``model.path`` means; see :mod:`qvgen.models.folder.model_path`.

        Raises:
            ValueError: there is none; the message says what is there instead.
        """
        remedy = cls.whole_remedy(path, repository=repository, model=model)
        folder = find_model_folder(path, repository=repository, download=remedy)
        return cls(path=folder, repository=repository, model=model)

    @classmethod
    def whole_remedy(cls, path: str | Path, *, repository: str, model: str) -> str:
        """The remedy when there is no folder at all, for messages."""
        folder = Path(path).expanduser()
        is_file = folder.is_file() or folder.suffix in _FILE_SUFFIXES
        empty = not is_file and not (folder.is_dir() and any(folder.iterdir()))
        return download_remedy(repository, model=model, path=str(path) if empty else "FOLDER")

    def remedy(self, part: str) -> str:
        """The remedy when something of a part, such as vae, is not there, for messages."""
        cached = cache_of(self.path)
        if cached is None:
            return f"get it with `hf download {self.repository} --include '{part}' --local-dir {self.path}`"
        repository, root = cached
        place = "" if root == cache_root() else f" --cache-dir {root}"
        return f"get it with `hf download {repository} --include '{part}'{place}`"

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a file such as ``transformer/config.json``.

        Raises:
            ValueError: it is missing, holds no mapping, or names code (see :mod:`qvgen.models.folder.foreign_code`).
        """
        file = self.path / name
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{file} can't be read ({error.strerror}); {self.remedy(name)}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is no JSON ({_one_line(error)}); {self.remedy(name)}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{file} holds no mapping; {self.remedy(name)}")
        self._check(content, name=name)
        return content

    def _check(self, content: Mapping[str, Any], *, name: str) -> None:
        """Raise ValueError where a file's content names code that would be followed."""
        (check_model_index if name == "model_index.json" else check_config)(content, file=self.path / name)

    def read_config(self, component: str) -> dict[str, Any]:
        """A component's configuration; see :meth:`read_json`."""
        own = {"model_index": "model_index.json", **{name: f"{name}/{name}_config.json" for name in _NAMED_CONFIGS}}
        return self.read_json(own.get(component, f"{component}/config.json"))

    def revision(self, component: str) -> str:
        """Content key of a component's weights (see the head of this file), 64 hex digits.

        Raises:
            ValueError: the component has no weights here, or files that are no safetensors.
        """
        weights = self._weights(component)
        digest = hashlib.sha256((self.path / component / "config.json").read_bytes())
        for file in weights.files:
            digest.update(file.name.encode())
            header = read_header(file)
            digest.update(header[0])
            for part in first_bytes(file, header, count=_BYTES_PER_TENSOR):
                digest.update(part)
        return digest.hexdigest()

    def checksum(self, component: str) -> str:
        """SHA-256 over config.json and every byte of a component's weights, 64 hex digits.

        Large files are read once, see :mod:`qvgen.checksum`: 28 GB take 25 s on one core, and no time when they are asked
        for again.

        Raises:
            ValueError: the component has no weights here.
        """
        return files_checksum([self.path / component / "config.json", *self._weights(component).files])

    def files_revision(self, component: str) -> str:
        """Content key of all files of a component without weights, such as tokenizer: sha256 over names and bytes.

        Raises:
            ValueError: it is missing.
        """
        files = sorted(path for path in (self.path / component).glob("*") if path.is_file())
        if not files:
            raise ValueError(f"{self.path / component} is missing; {self.remedy(f'{component}/*')}")
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.name} {file.stat().st_size} ".encode())
            digest.update(file.read_bytes())
        return digest.hexdigest()

    def num_values(self, component: str) -> int:
        """Values of all tensors of a component, from its files' headers; raises ValueError without weights."""
        headers = (read_header(file)[1] for file in self._weights(component).files)
        return sum(math.prod(entry["shape"]) for entries in headers for entry in entries.values())

    def weight_files(self, component: str) -> tuple[Path, ...]:
        """The safetensors files of a component, whole as far as headers say; raises ValueError without weights."""
        return self._weights(component).files

    def check_parts(self, components: Sequence[str]) -> None:
        """Find out from headers whether components with weights are there and whole.

        Raises:
            ValueError: one is not; the message says what and how to get it.
        """
        for component in components:
            self._weights(component)

    def load(self, component: str, model_class: type[Any], *, dtype: torch.dtype) -> nn.Module:
        """Load a component's weights strictly, from safetensors alone.

        Args:
            component: name of its folder.
            model_class: class of diffusers or transformers; config.json must name no other.
            dtype: Type of the parameters; those that the class keeps in float32 stay so.

        Returns:
            The module in eval mode, without gradients, on the CPU.

        Raises:
            ValueError: weights are missing, damaged, of another model, or not finite (in ``dtype`` as in the file).
        """
        config = self.read_json(f"{component}/config.json")
        remedy = self.remedy(f"{component}/*")
        named = config.get("_class_name") or (config.get("architectures") or [model_class.__name__])[0]
        if named != model_class.__name__:
            raise ValueError(f"{self.path / component} holds a {named}, needed is a {model_class.__name__}; {remedy}")
        weights = self._weights(component)
        if weights.variant is not None:
            log.warning(
                "%s holds the variant %s alone; its rounded weights are used", self.path / component, weights.variant
            )
        key = "torch_dtype" if "_class_name" in config else "dtype"  # diffusers' name, and that of transformers
        try:
            module, info = model_class.from_pretrained(
                self.path / component,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                variant=weights.variant,
                **{key: dtype},
            )
        except (OSError, RuntimeError, KeyError, SafetensorError) as error:
            raise ValueError(f"{self.path / component} can't be loaded ({_one_line(error)}); {remedy}") from error
        for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if info[kind]:
                what = kind.replace("_keys", "")
                raise ValueError(
                    f"{self.path / component}: {len(info[kind])} tensors are {what}, the first is "
                    f"{sorted(map(str, info[kind]))[0]}; {remedy}"
                )
        assert isinstance(module, nn.Module)
        check_finite_weights(module, files=list(weights.files), remedy=remedy)
        return module.requires_grad_(False).eval()

    def load_tokenizer(self, name: str = "tokenizer") -> Any:
        """Load a tokenizer's folder; see :mod:`qvgen.models.folder.tokenizer_folder`.

        Raises:
            ValueError: it is missing or damaged, or names code.
            RuntimeError: sentencepiece is needed and not installed.
        """
        self.check_tokenizer(name)
        return load_tokenizer(self.path / name, remedy=self.remedy(f"{name}/*"))

    def check_tokenizer(self, name: str = "tokenizer") -> None:
        """Find out whether a tokenizer is there; raises ValueError or RuntimeError where it can't be used."""
        check_tokenizer(self.path / name, remedy=self.remedy(f"{name}/*"))

    def _weights(self, component: str) -> WeightSet:
        """The weights of a component: all there, whole and in full precision as far as headers say."""
        folder = self.path / component
        config = {}
        if (folder / "config.json").is_file():
            config = self.read_json(f"{component}/config.json")
        if method := config.get("quantization_config"):
            raise ValueError(
                f"{folder} is quantized already (quantization_config: {_one_line(method)}); take the full-precision weights"
            )
        try:
            weights = find_weights(folder)
        except MissingWeightsError as error:
            raise ValueError(f"{folder} {error}; {self.remedy(f'{component}/*')}") from error
        except ValueError as error:
            raise ValueError(f"{folder} {error}") from error
        try:
            check_headers(weights)
        except MissingWeightsError as error:
            raise ValueError(f"{error}; {self.remedy(f'{component}/*')}") from error
        if not config:
            raise ValueError(f"{folder} lacks config.json; {self.remedy(f'{component}/config.json')}")
        return weights


def download_remedy(repository: str, *, model: str, path: str = "FOLDER") -> str:
    """How to get a model's weights, as the end of an error message; from the hub's cache if they are there already."""
    if cached_snapshot(repository) is not None:
        return f"the hub's cache holds {repository}: write model={model} model.path={repository}"
    return (
        f"download the weights with `hf download {repository} --local-dir {path}` and write "
        f"model={model} model.path={path}"
    )


def _one_line(value: object) -> str:
    return " ".join(str(value).split())[:300]
