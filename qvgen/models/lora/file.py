"""A LoRA's file on this machine: which file it is, what its header and its configuration say.

    FILE.safetensors                                         as trainers write it; see :mod:`qvgen.models.lora.key`
    FOLDER/pytorch_lora_weights.safetensors                  the same, by diffusers' ``save_lora_weights``
    FOLDER/{adapter_config.json,adapter_model.safetensors}   peft's adapter, by ``save_pretrained``

Of a configuration only rank, alpha and rsLoRA count: the tensors say which layers it is of, and the rest is about training.
What makes it more than a LoRA (DoRA, PiSSA's other base weights, ...) is refused. Pickles are never read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qvgen.models.folder.safetensors_header import read_header
from qvgen.models.folder.weight_set import PICKLES

DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
_PEFT_WEIGHTS = "adapter_model.safetensors"
_PEFT_CONFIG = "adapter_config.json"
_HEADER_CONFIG = "lora_adapter_metadata"
"""Where diffusers keeps the LoraConfig in a safetensors file's header."""

_USED_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_IGNORED_FIELDS = (
    "task_type", "auto_mapping", "peft_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "modules_to_save", "bias", "lora_bias", "layers_to_transform", "layers_pattern",
    "lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "runtime_config", "trainable_token_indices", "ensure_weight_tying", "init_lora_weights",
)  # fmt: skip
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Starting points of training that leave the base weights alone."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The factor of a layer, as a configuration gives it.

    Attributes:
        fields: Fields of peft's LoraConfig: r and lora_alpha at least.
    """

    fields: Mapping[str, Any]

    def factor(self, name: str, *, rank: int) -> float:
        """Factor of a layer: alpha / rank, or for rsLoRA alpha / sqrt(rank).

        Args:
            name: Name of the layer in the transformer.
            rank: Rank of its tensors.

        Raises:
            ValueError: the configuration has another rank, or no numbers.
        """
        try:
            expected = self._value("r", "rank_pattern", name)
            alpha = self._value("lora_alpha", "alpha_pattern", name)
            if int(expected) != rank:
                raise ValueError(f"{name} has rank {expected} there and {rank} in its tensors")
            return float(alpha) / (rank**0.5 if self.fields.get("use_rslora") else rank)
        except (TypeError, ValueError, re.error) as error:
            raise ValueError(f"its configuration is not of its tensors ({one_line(error)}); get it again") from error

    def _value(self, plain: str, patterns: str, name: str) -> Any:
        from peft.utils.other import get_pattern_key

        given = self.fields.get(patterns) or {}
        return given.get(get_pattern_key(given.keys(), name), self.fields[plain])


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """A LoRA's weights and what stands beside them.

    Attributes:
        path: file or folder, as it was given.
        key: the configuration's key of that path, for messages.

    Raises:
        ValueError: there is nothing that can be read.
    """

    path: Path
    key: str = "model.lora"

    def __post_init__(self) -> None:
        _ = self.entries  # raises

    def error(self, reason: str) -> ValueError:
        """An error about this file, in one line."""
        return ValueError(f"{self.key}={self.path}: {reason}")

    @cached_property
    def weights(self) -> Path:
        """The file that holds the tensors."""
        if not self.path.exists():
            raise self.error("there is no such file or folder; write the path of a .safetensors file or of its folder")
        if self.path.is_file() and self.path.suffix == ".safetensors":
            return self.path
        names = sorted(file.name for file in self.path.iterdir()) if self.path.is_dir() else [self.path.name]
        present = [name for name in (DIFFUSERS_WEIGHTS, _PEFT_WEIGHTS) if self.path.is_dir() and name in names]
        if present == [_PEFT_WEIGHTS] and _PEFT_CONFIG not in names:
            raise self.error(f"it has no {_PEFT_CONFIG}, which says rank and alpha; download that too")
        if len(present) == 1:
            return self.path / present[0]
        if present:
            raise self.error(f"it holds both {' and '.join(present)}; write the path of the first, or part them")
        if pickles := [name for name in names if name.endswith(PICKLES)]:
            raise self.error(f"{pickles[0]} is a pickle, which runs code when it is read; convert it to safetensors")
        if self.path.is_file():
            raise self.error("it is no .safetensors file; convert it to safetensors")
        others = [name for name in names if name.endswith(".safetensors")]
        if len(others) == 1:
            return self.path / others[0]
        if others:
            shown = ", ".join(others[:3])
            raise self.error(f"it holds {len(others)} files ({shown}); write the path of one, or a list of paths")
        raise self.error(f"it holds neither {DIFFUSERS_WEIGHTS} nor {_PEFT_WEIGHTS}; write the file's own path")

    @property
    def _config_file(self) -> Path | None:
        """The configuration of peft, which lies beside its weights."""
        beside = self.weights.parent / _PEFT_CONFIG
        return beside if self.weights.name == _PEFT_WEIGHTS and beside.is_file() else None

    @cached_property
    def entries(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape of every tensor."""
        try:
            _, entries = read_header(self.weights)
        except (ValueError, OSError) as error:
            raise self.error(f"{self.weights.name} {one_line(error)}; download it again, or convert it") from error
        return {key: tuple(entry["shape"]) for key, entry in entries.items()}

    @cached_property
    def revision(self) -> str:
        """Sha256 over the bytes of the weights, and of the configuration beside them; 64 hex digits."""
        digest = hashlib.sha256()
        for file in filter(None, (self._config_file, self.weights)):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def open(self) -> Any:
        """Open the weights; a context manager whose ``get_tensor(key)`` reads one."""
        try:
            return safe_open(self.weights, framework="pt", device="cpu")
        except (OSError, SafetensorError) as error:
            raise self.error(
                f"{self.weights.name} is no safetensors file ({one_line(error)}); download it again"
            ) from error

    def config(self, component: str) -> LoraConfig | None:
        """The entry of peft's file, or of the header that diffusers writes, for a transformer; None where there is none.

        Raises:
            ValueError: it is no JSON, or makes the file more than a LoRA.
        """
        if (file := self._config_file) is not None:
            return self._plain(self._read_json(file.read_text(encoding="utf-8")))
        with self.open() as stream:
            config = self._read_json((stream.metadata() or {}).get(_HEADER_CONFIG, "{}"))
        fields = {
            name.removeprefix(f"{component}."): config[name] for name in config if name.startswith(f"{component}.")
        }
        return self._plain(fields) if fields else None

    def _read_json(self, text: str) -> dict[str, Any]:
        try:
            return dict(json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise self.error(f"its configuration is no JSON mapping ({one_line(error)}); get it again") from error

    def _plain(self, config: Mapping[str, Any]) -> LoraConfig:
        """The fields that count; raises ValueError for one that makes it no ordinary LoRA."""
        if config.get("peft_type", "LORA") != "LORA" or not {"r", "lora_alpha"} <= set(config):
            shown = ", ".join(f"{key}={config.get(key)}" for key in ("peft_type", "r", "lora_alpha"))
            raise self.error(f"its configuration has {shown}; use a LoRA with its rank and alpha")
        for key, value in config.items():
            extra = value and key not in (*_USED_FIELDS, *_IGNORED_FIELDS)
            if extra or (key == "init_lora_weights" and value not in _PLAIN_INITS):
                raise self.error(f"{key}={one_line(value)} makes it no ordinary LoRA; merge it with peft beforehand")
        return LoraConfig(fields={key: config[key] for key in _USED_FIELDS if key in config})


def one_line(value: object) -> str:
    """A value's text on one line, cut to 200 characters."""
    return " ".join(str(value).split())[:200]
