"""LoRAs of tiny models, written by diffusers' and peft's own save functions, and what they must make of the weights."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, WanPipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tests.models import family_checks
from tests.models.hub_folders import make_cogvideox_folder, make_wan_folder

ignore_peft_of_biases = pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape")
"""peft takes the bias of a B for a matrix that lost a dimension, when it is asked for what to save."""

FILE = "pytorch_lora_weights.safetensors"
LAYERS = {
    "cogvideox": [
        "attn1.to_q",
        "attn1.to_out.0",
        "norm1.linear",
        "ff.net.2",
        "time_embedding.linear_1",
        "patch_embed.proj",
    ],
    "wan": ["attn1.to_q", "attn2.to_out.0", "ffn.net.0.proj", "condition_embedder.time_proj", "patch_embedding"],
}
PIPELINES = {"cogvideox": CogVideoXPipeline, "wan": WanPipeline}


def tiny_family(name: str, folder: Path | None, **changes: Any) -> Any:
    return family_checks.tiny_family(name, folder, **({"dtype": "float32"} | changes))


@dataclass(frozen=True, kw_only=True)
class Model:
    name: str
    folder: Path
    pipeline: Any


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A LoRA as it was saved: A, B, alpha / rank, and maybe B's bias, of each layer."""

    path: Path
    layers: dict[str, tuple[Tensor, Tensor, float, Tensor | None]]


def make_model(name: str, path: Path) -> Model:
    make = {"cogvideox": make_cogvideox_folder, "wan": make_wan_folder}[name]
    return Model(name=name, folder=make(path), pipeline=PIPELINES[name])


def adapted(model: Model, *, seed: int = 0, **changes: Any) -> tuple[nn.Module, LoraConfig]:
    """The model's transformer with a LoRA of random A and B, of two ranks and alphas."""
    transformer = plain_teacher(model)
    fields = {
        "r": 4, "rank_pattern": {"to_q": 3}, "lora_alpha": 6, "alpha_pattern": {"to_q": 1},
        "target_modules": LAYERS.get(model.name),
    }  # fmt: skip
    config = LoraConfig(**(fields | changes))
    transformer.add_adapter(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return transformer, config


def saved_layers(
    state: dict[str, Tensor], factor: Callable[[str, int], float]
) -> dict[str, tuple[Tensor, Tensor, float, Tensor | None]]:
    found = {}
    for key, down in state.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            bias = state.get(f"{name}.lora_B.bias")
            found[name] = (down, state[f"{name}.lora_B.weight"], factor(name, down.shape[0]), bias)
    return found


def pattern_factor(name: str, rank: int) -> float:
    return (1 if name.endswith("to_q") else 6) / rank


def save_diffusers(model: Model, path: Path, *, metadata: bool = True, **changes: Any) -> Saved:
    transformer, config = adapted(model, **changes)
    state = get_peft_model_state_dict(transformer)
    model.pipeline.save_lora_weights(
        path, transformer_lora_layers=state, transformer_lora_adapter_metadata=config.to_dict() if metadata else None
    )
    return Saved(path=path / FILE, layers=saved_layers(state, pattern_factor if metadata else lambda name, rank: 1.0))


def save_folder(model: Model, path: Path) -> Saved:
    saved = save_diffusers(model, path)
    return Saved(path=path, layers=saved.layers)


def save_without_metadata(model: Model, path: Path) -> Saved:
    return save_diffusers(model, path, metadata=False)


def save_with_bias(model: Model, path: Path) -> Saved:
    layers = [
        layer for layer in LAYERS[model.name] if not layer.startswith("patch")
    ]  # peft has no bias for convolutions
    return save_diffusers(model, path, lora_bias=True, target_modules=layers)


def save_rank_stabilized(model: Model, path: Path) -> Saved:
    saved = save_diffusers(model, path, use_rslora=True)
    layers = {
        name: (down, up, factor * down.shape[0] ** 0.5, bias) for name, (down, up, factor, bias) in saved.layers.items()
    }
    return Saved(path=saved.path, layers=layers)


def save_peft(model: Model, path: Path) -> Saved:
    transformer, config = adapted(model)
    state = get_peft_model_state_dict(transformer)
    wrapped = get_peft_model(plain_teacher(model), config)
    own = {key: value.clone() for key, value in wrapped.state_dict().items()}
    for key, value in state.items():
        own["base_model.model." + key.replace(".weight", ".default.weight")] = value
    wrapped.load_state_dict(own)
    wrapped.save_pretrained(path)
    return Saved(path=path, layers=saved_layers(state, pattern_factor))


FORMS = {
    "file": save_diffusers, "folder": save_folder, "no metadata": save_without_metadata, "peft": save_peft,
    "bias": save_with_bias, "rsLoRA": save_rank_stabilized,
}  # fmt: skip


def plain_teacher(model: Model, **changes: Any) -> Any:
    return tiny_family(model.name, model.folder, **changes).load_teacher()


def exact(weight: Tensor, layer: tuple[Tensor, Tensor, float, Tensor | None], *, scale: float) -> Tensor:
    down, up, factor, _ = layer
    product = up.double().flatten(1) @ down.double().flatten(1)
    return weight.double() + scale * factor * product.reshape(weight.shape)


def check_merged(merged: nn.Module, plain: nn.Module, saved: Saved, *, scale: float) -> None:
    """Layers of the LoRA are the formula's, all others bitwise what they were, and peft has left nothing."""
    before, after = plain.state_dict(), merged.state_dict()
    assert list(after) == list(before)
    for key, weight in before.items():
        name, _, kind = key.rpartition(".")
        layer = saved.layers.get(name)
        if layer is None or (kind == "bias" and layer[3] is None):
            assert torch.equal(after[key], weight), key
            continue
        wanted = (
            exact(weight, layer, scale=scale) if kind == "weight" else weight.double() + scale * layer[2] * layer[3]
        )
        assert torch.allclose(after[key].double(), wanted, rtol=0, atol=1e-6), key  # float32 of values about 1
        assert (after[key] - weight).abs().max() > 1e-2, key
    assert [(name, type(module)) for name, module in merged.named_modules()] == [
        (name, type(module)) for name, module in plain.named_modules()
    ]
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    assert set(vars(merged)) == set(vars(plain))
    assert not merged._hf_peft_config_loaded
    assert not hasattr(merged, "peft_config")
    assert dict(merged.config) == dict(plain.config)
    assert not any(module.training for module in merged.modules())
    assert not any(parameter.requires_grad for parameter in merged.parameters())


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
