"""A LoRA that becomes part of a transformer's weights when they are loaded, before anything is quantized.

    W <- W + scale alpha / rank B A        b <- b + scale alpha / rank b_B        (arXiv 2106.09685, Eq. 3)

What is read, from safetensors alone:

    FILE.safetensors                                         diffusers' pipeline format, and what its loader converts to that
    FOLDER/pytorch_lora_weights.safetensors                  the same, by ``save_lora_weights``
    FOLDER/{adapter_config.json,adapter_model.safetensors}   peft's adapter, by ``save_pretrained``

diffusers converts keys and creates the layers, peft adds the product to the weight. What they would drop in silence or with a
warning is refused here beforehand. The arithmetic is float32 whatever the dtypes of transformer and LoRA, with one cast at
the end; peft alone would round A, B and the product to the transformer's dtype before it adds. Layers are merged block by
block, so that no more than one block is in float32 beside a bf16 teacher.

Of the file's configuration only rank, alpha and rsLoRA count: the tensors say which layers it is of, and the rest is about
training. What makes it more than a LoRA (DoRA, PiSSA's other base weights, ...) is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qvgen.quant.finite import check_finite

_DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
_PEFT_WEIGHTS = "adapter_model.safetensors"
_PEFT_CONFIG = "adapter_config.json"
_PEFT_PREFIX = "base_model.model"
_HEADER_CONFIG = "lora_adapter_metadata"
"""Where diffusers keeps the LoraConfig in a safetensors file's header."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_USED_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_IGNORED_FIELDS = (
    "task_type", "auto_mapping", "peft_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "modules_to_save", "bias", "lora_bias", "layers_to_transform", "layers_pattern",
    "lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "runtime_config", "trainable_token_indices", "ensure_weight_tying", "init_lora_weights",
)  # fmt: skip
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Starting points of training that leave the base weights alone."""

_KINDS = ("A.weight", "B.weight", "B.bias")
_CONSUMED = (*(f".lora_{kind}" for kind in _KINDS), ".lora_down.weight", ".lora_up.weight", ".alpha")
"""Ends of keys that diffusers' converters use or refuse, but never drop."""


@dataclass(frozen=True, kw_only=True)
class LoraPart:
    """The LoRA of one transformer.

    Attributes:
        tensors: float32, ``NAME.lora_A.weight`` [r, in, ...], ``NAME.lora_B.weight`` [out, r, ...] and maybe
            ``NAME.lora_B.bias`` [out]; NAME is a module of the transformer.
        config: fields of peft's LoraConfig; None: alpha is the rank, which is what diffusers takes then.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA on this machine.

    Attributes:
        path: file or folder, as in ``model.lora``.
        loader: the diffusers pipeline whose ``lora_state_dict`` converts the file.
        components: the model's transformers, as its folder and the file's keys name them.
        trained: the one that is trained. A file with keys of ``transformer`` alone is about one transformer, and
            diffusers leaves it to the caller which: it is this one.

    Raises:
        ValueError: there is nothing that can be read.
    """

    path: Path
    loader: Any
    components: tuple[str, ...]
    trained: str

    def __post_init__(self) -> None:
        _ = self._weights  # raises

    @cached_property
    def _weights(self) -> Path:
        """The file that holds the tensors."""
        if not self.path.exists():
            raise self._error("there is no such file or folder; write the path of a .safetensors file or of its folder")
        if self.path.is_file() and self.path.suffix == ".safetensors":
            return self.path
        names = sorted(file.name for file in self.path.iterdir()) if self.path.is_dir() else [self.path.name]
        found = [name for name in (_DIFFUSERS_WEIGHTS, _PEFT_WEIGHTS) if self.path.is_dir() and name in names]
        if found == [_PEFT_WEIGHTS] and _PEFT_CONFIG not in names:
            raise self._error(f"it has no {_PEFT_CONFIG}, which says rank and alpha; download that too")
        if len(found) == 1:
            return self.path / found[0]
        if found:
            raise self._error(f"it holds both {' and '.join(found)}; write the path of the first, or part them")
        if pickles := [name for name in names if name.endswith(_PICKLES)]:
            raise self._error(f"{pickles[0]} is a pickle, which runs code when it is read; convert it to safetensors")
        if self.path.is_file():
            raise self._error("it is no .safetensors file; convert it to safetensors")
        raise self._error(f"it holds neither {_DIFFUSERS_WEIGHTS} nor {_PEFT_WEIGHTS}; write the file's own path")

    @property
    def _is_peft(self) -> bool:
        return self._weights == self.path / _PEFT_WEIGHTS

    @cached_property
    def revision(self) -> str:
        """Sha256 over the bytes of the weights, and of the configuration beside them; 64 hex digits."""
        digest = hashlib.sha256()
        for file in (self._weights, self.path / _PEFT_CONFIG) if self._is_peft else (self._weights,):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def merge_(self, transformer: Any, *, component: str, scale: float) -> None:
        """Add the LoRA to a transformer's weights, in place; nothing but the weights is changed.

        Args:
            transformer: diffusers model, on any device, in any floating dtype.
            component: which of the model's transformers it is. One that is not trained may have no keys.
            scale: factor of the whole LoRA; 0 leaves the weights as they are.

        Raises:
            ValueError: the file can't be read, holds no LoRA, or one of another model.
        """
        parts = self._read()
        if component in parts:
            self._merge_part_(transformer, parts[component], scale=scale)
        elif component == self.trained:
            raise self._error(f"it is of {', '.join(parts)}, {component} is trained; choose the expert that it is of")

    def _error(self, reason: str) -> ValueError:
        return ValueError(f"model.lora={self.path}: {reason}")

    # Reading

    def _read(self) -> dict[str, LoraPart]:
        """The file's LoRAs by component."""
        raw, header = self._read_safetensors()
        if not any("lora" in key for key in raw):
            raise self._error(f"it holds no LoRA keys (its first is {min(raw, default='none')}); write a LoRA's path")
        if self._is_peft:
            config = self._plain_config(self._read_json((self.path / _PEFT_CONFIG).read_text(encoding="utf-8")))
            tensors = self._split(raw, components=(_PEFT_PREFIX,))[_PEFT_PREFIX]
            return {self.trained: LoraPart(tensors=tensors, config=config)}
        config = self._read_json(header.get(_HEADER_CONFIG, "{}"))
        parts = {}
        for component, tensors in self._split(self._convert(raw), components=self.components).items():
            fields = {
                key.removeprefix(f"{component}."): config[key] for key in config if key.startswith(f"{component}.")
            }
            parts[component] = LoraPart(tensors=tensors, config=self._plain_config(fields) if fields else None)
        return {self.trained: parts["transformer"]} if set(parts) == {"transformer"} else parts

    def _read_safetensors(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors, in float32 so that alphas are folded in without rounding, and header."""
        try:
            with safe_open(self._weights, framework="pt", device="cpu") as stream:
                tensors = {key: stream.get_tensor(key).float() for key in stream.keys()}  # noqa: SIM118
                return tensors, stream.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise self._error(
                f"{self._weights.name} is no safetensors file ({_one_line(error)}); download it again, or convert it"
            ) from error

    def _read_json(self, text: str) -> dict[str, Any]:
        try:
            return dict(json.loads(text))
        except (ValueError, TypeError) as error:
            raise self._error(f"its configuration is no JSON mapping ({_one_line(error)}); get it again") from error

    def _convert(self, raw: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keys and alphas as diffusers has them; raises ValueError for a tensor that it would leave out."""
        try:
            converted: dict[str, Tensor] = self.loader.lora_state_dict(dict(raw))
        except (ValueError, KeyError, IndexError, AttributeError, UnboundLocalError, RuntimeError) as error:
            raise self._error(f"diffusers can't convert it ({_one_line(error)}); use a LoRA of this model") from error
        kept = {id(tensor) for tensor in converted.values()}
        for key, tensor in raw.items():
            if not (id(tensor) in kept or key.endswith(_CONSUMED)) and tensor.any():
                raise self._error(f"{key} is no LoRA's (but of DoRA or a full difference); use an ordinary LoRA")
        return converted

    def _split(self, tensors: Mapping[str, Tensor], *, components: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
        """Tensors by component, without it in their names."""
        parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in tensors.items():
            component = next((name for name in components if key.startswith(f"{name}.")), None)
            if component is None:
                remedy = "write the path of its folder" if key.startswith(_PEFT_PREFIX) else "use a LoRA of this model"
                raise self._error(f"{key} is not of {' or '.join(components)}; {remedy}")
            parts[component][key.removeprefix(f"{component}.")] = tensor
        return dict(parts)

    def _plain_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that count; raises ValueError for one that makes it no ordinary LoRA."""
        if config.get("peft_type", "LORA") != "LORA" or not {"r", "lora_alpha"} <= set(config):
            found = ", ".join(f"{key}={config.get(key)}" for key in ("peft_type", "r", "lora_alpha"))
            raise self._error(f"its configuration has {found}; use a LoRA with its rank and alpha")
        for key, value in config.items():
            extra = value and key not in (*_USED_FIELDS, *_IGNORED_FIELDS)
            if extra or (key == "init_lora_weights" and value not in _PLAIN_INITS):
                raise self._error(f"{key}={_one_line(value)} makes it no ordinary LoRA; merge it with peft beforehand")
        return {key: config[key] for key in _USED_FIELDS if key in config}

    # Merging

    def _merge_part_(self, transformer: Any, part: LoraPart, *, scale: float) -> None:
        """Check all of it, then merge block by block."""
        layers = self._check_part(transformer, part.tensors)
        attributes, keys = set(vars(transformer)), list(transformer.state_dict())
        groups: dict[tuple[str, bool], dict[str, nn.Module]] = defaultdict(dict)
        for name, layer in layers.items():  # peft gives all layers of one call a bias, or none
            groups[".".join(name.split(".")[:2]), f"{name}.lora_B.bias" in part.tensors][name] = layer
        for (_, has_bias), group in groups.items():
            tensors = {key: part.tensors[key] for name in group for key in _tensor_names(name) if key in part.tensors}
            merged = [(f"{name}.{key}", value) for name in group for key, value in group[name].named_parameters()]
            dtypes = [parameter.dtype for _, parameter in merged]
            for layer in group.values():
                layer.float()
            fields = part.config and {**part.config, "target_modules": list(group), "lora_bias": has_bias}
            self._load_and_merge_(transformer, tensors, fields=fields, scale=scale)
            for (_, parameter), dtype in zip(merged, dtypes, strict=True):
                parameter.data = parameter.data.to(dtype)
            source = f"model.lora={self.path}: merged with model.lora_scale={scale}"
            check_finite(merged, source=source, remedy="lower the scale, or get the LoRA again")
        for name in set(vars(transformer)) - attributes:  # peft_config, _hf_peft_config_loaded, lora_scale
            delattr(transformer, name)
        assert list(transformer.state_dict()) == keys, "peft left something in the transformer"

    def _load_and_merge_(
        self, transformer: Any, tensors: dict[str, Tensor], *, fields: dict[str, Any] | None, scale: float
    ) -> None:
        """Let diffusers put LoRA layers in, peft merge them, and diffusers take them out."""
        try:
            # low_cpu_mem_usage: without it peft draws random A first, from torch's global generator
            config = fields and {**fields, **_used_patterns(fields)}
            transformer.load_lora_adapter(tensors, prefix=None, metadata=config, low_cpu_mem_usage=True)
        except (ValueError, RuntimeError, TypeError, AttributeError, re.error) as error:
            raise self._error(f"its configuration is not of its tensors ({_one_line(error)}); get it again") from error
        loaded = sum(".lora_" in name for name in transformer.state_dict())
        assert loaded == len(tensors), f"{loaded} of {len(tensors)} tensors were loaded"
        transformer.fuse_lora(lora_scale=scale)
        transformer.unload_lora()

    def _check_part(self, transformer: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
        """The layers that a LoRA is of; raises ValueError unless every tensor belongs to one and fits it."""
        modules = dict(transformer.named_modules())
        layers: dict[str, nn.Module] = {}
        for key in tensors:
            name = key.rpartition(".lora_")[0]
            if key not in _tensor_names(name) or not isinstance(modules.get(name), nn.Linear | nn.Conv2d | nn.Conv3d):
                raise self._error(f"{key} matches no layer of {type(transformer).__name__}; use a LoRA of this model")
            layers[name] = modules[name]
        for name, layer in layers.items():
            down, up, bias = (tensors.get(key) for key in _tensor_names(name))
            if down is None or up is None:
                raise self._error(f"{name} lacks its lora_{'B' if up is None else 'A'}.weight; download it again")
            outputs, *inputs = layer.weight.shape
            fits = [*down.shape[1:], *up.shape] == [*inputs, outputs, *down.shape[:1], *[1] * (len(inputs) - 1)]
            if not fits or (bias is not None and (layer.bias is None or bias.shape != layer.bias.shape)):
                shapes = f"A {list(down.shape)}, B {list(up.shape)}{'' if bias is None else ' with a bias'}"
                raise self._error(f"{shapes} does not fit {name} {list(layer.weight.shape)}; use a LoRA of this model")
        return layers


def _tensor_names(layer: str) -> list[str]:
    """Names of A, B and B's bias of a layer."""
    return [f"{layer}.lora_{kind}" for kind in _KINDS]


def _used_patterns(fields: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The patterns of ranks and alphas that are of these layers; peft warns of others."""
    found = {}
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = fields.get(key) or {}
        used = {get_pattern_key(patterns.keys(), name) for name in fields["target_modules"]}
        found[key] = {pattern: value for pattern, value in patterns.items() if pattern in used}
    return found


def _one_line(value: object) -> str:
    return " ".join(str(value).split())[:200]
