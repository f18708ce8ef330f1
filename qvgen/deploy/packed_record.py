"""The manifest of a packed transformer that is in memory, and its form in diffusers' config.json.

config.json has diffusers' own entries and the manifest, so that ``from_pretrained`` needs no other file: what it says of
the transformer's arguments and of the file of weights is not there twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import diffusers
from torch import nn

from qvgen.deploy.attention_entry import attention_entries
from qvgen.deploy.delta_switch import find_switch
from qvgen.deploy.manifest import Manifest, layer_entry
from qvgen.deploy.quantization_config import QvgenConfig
from qvgen.layers.swap import packed_layers

CONFIG_FILE, INDEX_FILE = "config.json", "diffusion_pytorch_model.safetensors.index.json"
"""The files that ``from_pretrained`` of a model reads, besides the weights that the index names."""

NO_SHA256 = "0" * 64
"""The checksum in a manifest whose weights were not written yet."""


def describe(
    model: nn.Module,
    *,
    sha256: str = NO_SHA256,
    base_name: str = "",
    base_revision: str = "",
    base_arguments: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> Manifest:
    """The manifest of a transformer with packed layers."""
    packed = packed_layers(model)
    band, switch = next(iter(packed.values())).noise_band, find_switch(model)
    return Manifest(
        base_name=base_name,
        base_revision=base_revision,
        base_arguments=dict(base_arguments or {}),
        transformer=type(model).__name__,
        transformer_config=plain_config(model),
        num_noise_bands=band.num_bands,
        timesteps=band.timesteps,
        strict_timesteps=band.strict,
        guided=band.guided,
        activation_switch=None if switch is None else switch.config,
        layers=tuple(layer_entry(key, layer) for key, layer in packed.items()),
        attentions=attention_entries(model),
        skipped=tuple(key for key, module in model.named_modules() if isinstance(module, nn.Linear)),
        training=dict(training or {}),
        sha256=sha256,
    )


def to_quantization_config(manifest: Manifest) -> QvgenConfig:
    """The manifest as the ``quantization_config`` of config.json."""
    content = manifest.to_dict()
    del content["sha256"], content["base"]["config"]
    return QvgenConfig(manifest=content)


def from_quantization_config(stored: QvgenConfig, transformer_config: Mapping[str, Any], *, source: str) -> Manifest:
    """Inverse of :func:`to_quantization_config`; everything is checked as that of a manifest.json is.

    Raises:
        ValueError: Names the source and what is wrong with it.
    """
    content = stored.manifest
    if not isinstance(content, Mapping) or not isinstance(base := content.get("base"), Mapping):
        raise ValueError(f"{source} has a quantization_config without a manifest; export the checkpoint again")
    whole = {**content, "base": {**base, "config": dict(transformer_config)}, "sha256": NO_SHA256}
    try:
        text = json.dumps(whole)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{source} has a quantization_config that is no JSON ({error})") from error
    return Manifest.from_json(text.encode(), source=source)


def config_json(manifest: Manifest) -> bytes:
    """Content of the config.json beside a packed file, in the form that diffusers writes."""
    content = {
        "_class_name": manifest.transformer,
        "_diffusers_version": diffusers.__version__,
        **manifest.transformer_config,
        "quantization_config": to_quantization_config(manifest).to_dict(),
    }
    return (json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def index_json(names: Mapping[str, int], *, file: str) -> bytes:
    """Content of diffusers' index of weights, which leads to a file of another name than diffusers' own.

    Args:
        names: Bytes of each tensor, by name.
        file: The file that holds them all.
    """
    content = {"metadata": {"total_size": sum(names.values())}, "weight_map": dict.fromkeys(sorted(names), file)}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def plain_config(model: nn.Module) -> dict[str, Any]:
    """The transformer's own arguments, without what diffusers notes of its quantization and of where it came from."""
    config = dict(getattr(model, "config", {}))
    return {
        key: _plain(value) for key, value in config.items() if not key.startswith("_") and key != "quantization_config"
    }


def _plain(value: Any) -> Any:
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
