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
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn
from transformers import AutoTokenizer

from qvgen.checksum import files_checksum
from qvgen.models.finite_weights import check_finite_weights

_BYTES_PER_TENSOR = 4096
_MAX_HEADER_BYTES = 100_000_000
"""The safetensors format's own limit."""


@dataclass(frozen=True, kw_only=True)
class HubFolder:
    """One model's folder.

    Attributes:
        path: the folder.
        repository: ORG/NAME on the hub, for messages.
        model: name of the model's configuration, for messages.

    Raises:
        ValueError: there is no such folder, or it has no model_index.json.
    """

    path: Path
    repository: str
    model: str

    def __post_init__(self) -> None:
        if not (self.path / "model_index.json").is_file():
            raise ValueError(f"model.path={self.path} holds no model_index.json; {self.remedy()}")

    def remedy(self) -> str:
        """What to do when something is not there."""
        return download_remedy(self.repository, model=self.model, path=str(self.path))

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a file such as ``transformer/config.json``.

        Raises:
            ValueError: it is missing or holds no mapping.
        """
        file = self.path / name
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{file} can't be read ({error.strerror}); {self.remedy()}") from error
        except ValueError as error:
            raise ValueError(f"{file} is no JSON ({error}); {self.remedy()}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{file} holds no mapping; {self.remedy()}")
        return content

    def revision(self, component: str) -> str:
        """Content key of a component's weights (see the head of this file), 64 hex digits.

        Raises:
            ValueError: the component has no weights here, or files that are no safetensors.
        """
        digest = hashlib.sha256((self.path / component / "config.json").read_bytes())
        for file in self._weight_files(component):
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                try:
                    for part in _sampled_bytes(stream):
                        digest.update(part)
                except (ValueError, struct.error, KeyError, TypeError) as error:
                    raise ValueError(f"{file} is no safetensors file ({error}); {self.remedy()}") from error
        return digest.hexdigest()

    def checksum(self, component: str) -> str:
        """SHA-256 over config.json and every byte of a component's weights, 64 hex digits.

        Large files are read once, see :mod:`qvgen.checksum`: 28 GB take 25 s on one core, and no time when they are asked
        for again.

        Raises:
            ValueError: the component has no weights here.
        """
        return files_checksum([self.path / component / "config.json", *self._weight_files(component)])

    def files_revision(self, component: str) -> str:
        """Content key of all files of a component without weights, such as tokenizer: sha256 over names and bytes.

        Raises:
            ValueError: it is missing.
        """
        files = sorted(path for path in (self.path / component).glob("*") if path.is_file())
        if not files:
            raise ValueError(f"{self.path / component} is missing; {self.remedy()}")
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.name} {file.stat().st_size} ".encode())
            digest.update(file.read_bytes())
        return digest.hexdigest()

    def load(self, component: str, model_class: type[Any], *, dtype: torch.dtype) -> nn.Module:
        """Load a component's weights strictly, from safetensors alone.

        Args:
            component: name of its folder.
            model_class: class of diffusers or transformers; config.json must name no other.
            dtype: of the parameters; what the class keeps in float32 stays so.

        Returns:
            The module in eval mode, without gradients, on the CPU.

        Raises:
            ValueError: weights are missing, damaged, of another model, or not finite (in ``dtype`` as in the file).
        """
        config = self.read_json(f"{component}/config.json")
        named = config.get("_class_name") or (config.get("architectures") or [model_class.__name__])[0]
        if named != model_class.__name__:
            raise ValueError(
                f"{self.path / component} holds a {named}, needed is a {model_class.__name__}; {self.remedy()}"
            )
        self._weight_files(component)
        key = "torch_dtype" if "_class_name" in config else "dtype"  # diffusers; transformers
        try:
            module, info = model_class.from_pretrained(
                self.path / component,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **{key: dtype},
            )
        except (OSError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{self.path / component} can't be loaded ({reason}); {self.remedy()}") from error
        for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if info[kind]:
                what = kind.replace("_keys", "")
                raise ValueError(
                    f"{self.path / component}: {len(info[kind])} tensors are {what}, the first is "
                    f"{sorted(map(str, info[kind]))[0]}; {self.remedy()}"
                )
        assert isinstance(module, nn.Module)
        check_finite_weights(module, files=self._weight_files(component), remedy=self.remedy())
        return module.requires_grad_(False).eval()

    def load_tokenizer(self) -> Any:
        """Load ``tokenizer/``: tokenizer.json, or spiece.model alone (CogVideoX's repositories), which sentencepiece reads.

        Raises:
            ValueError: it is missing or damaged.
            RuntimeError: sentencepiece is needed and not installed.
        """
        folder = self.path / "tokenizer"
        if not (folder / "tokenizer.json").is_file() and find_spec("sentencepiece") is None:
            raise RuntimeError(
                f"{folder} needs the package sentencepiece, which is not installed: pip install sentencepiece"
            )
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{folder} can't be loaded ({reason}); {self.remedy()}") from error

    def _weight_files(self, component: str) -> list[Path]:
        """All safetensors files of a component; every shard that an index names must be there."""
        folder = self.path / component
        files = sorted(folder.glob("*.safetensors"))
        if not files or not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no config.json with safetensors weights; {self.remedy()}")
        for index in folder.glob("*.safetensors.index.json"):
            shards = set(self.read_json(f"{component}/{index.name}").get("weight_map", {}).values())
            if lacking := sorted(shards - {file.name for file in files}):
                raise ValueError(f"{folder / lacking[0]} is missing; {self.remedy()}")
        return files


def download_remedy(repository: str, *, model: str, path: str = "FOLDER") -> str:
    """How to get a model's weights, as the end of an error message."""
    return (
        f"download the weights with `hf download {repository} --local-dir {path}` and write "
        f"model={model} model.path={path}"
    )


def _sampled_bytes(stream: BinaryIO) -> Iterator[bytes]:
    """Header, and the beginning of each tensor, of a safetensors file."""
    (length,) = struct.unpack("<Q", stream.read(8))
    if not 2 <= length <= _MAX_HEADER_BYTES:
        raise ValueError(f"header of {length} bytes")
    header = stream.read(length)
    yield header
    for name, entry in sorted(json.loads(header).items()):
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        stream.seek(8 + length + begin)
        size = min(end - begin, _BYTES_PER_TENSOR)
        part = stream.read(size)
        if len(part) != size:
            raise ValueError(f"the file ends within {name}")
        yield part
