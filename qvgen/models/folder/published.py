"""Which of the known models a folder's configurations are of, told before any weights are read.

A model is known by conf/model/NAME.yaml with its ``published`` configurations. Two questions are asked of a folder:

    kind    what weights of any size have in common: class, image condition, positions, patches over time, compression of the
            VAE, experts, text encoder. A folder of another kind is refused.
    sizes   blocks, heads and feed-forward channels. A folder whose sizes are exactly those of another model of its kind is
            refused; sizes of no known model are accepted, as a finetune may have them.

Image-to-video and control models have the same classes as text-to-video models and more inputs; those whose inputs no known
model has are refused too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

import yaml

from qvgen.config.leaf_file import installed_names, leaf_path

Configs = Callable[[str], Mapping[str, Any]]
"""Name of a component (transformer, vae, model_index) -> its configuration."""

_SIZES = ("num_layers", "num_attention_heads", "attention_head_dim", "hidden_size", "ffn_dim")
_CONDITIONS = (
    "image_dim",
    "added_kv_proj_dim",
    "pos_embed_seq_len",
    "ofs_embed_dim",
    "use_learned_positional_embeddings",
    "image_condition_type",
)
"""Keys of a transformer that is given an image besides the text."""

_IMAGE, _NO_IMAGE = "the image condition", "none"


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """A model of conf/model.

    Attributes:
        name: Name as in ``model=NAME``.
        repository: ORG/NAME on the hub; empty for one that is trained here.
        kind: what its weights have in common with finetunes of any size.
        sizes: what it has of ``_SIZES``.
        takes_image: Whether its videos begin with an image; Wan2.2-TI2V-5B is two models of one folder, with and without.
        own_classes: Names of its parts' classes that diffusers does not have -> their modules.
    """

    name: str
    repository: str
    kind: Mapping[str, Any]
    sizes: Mapping[str, Any]
    takes_image: bool = False
    own_classes: Mapping[str, str] = field(default_factory=dict)


def check_is_known(configs: Configs, *, name: str, given: str) -> None:
    """Refuse a folder whose model is given an image, or something else, in a way that no known model is.

    Args:
        configs: the folder's configurations.
        name: Name of the model that was chosen.
        given: How the user named it, for the message.

    Raises:
        ValueError: it is such a model; the message names what shows it and the model to use.
    """
    transformer, vae, index = configs("transformer"), configs("vae"), configs("model_index")
    latent, inputs = _channels(transformer, vae)
    signs = [f"{key} is {transformer[key]}" for key in _CONDITIONS if transformer.get(key)]
    if inputs != latent:
        signs.insert(0, f"its transformer takes {inputs} channels and its VAE makes {latent}")
    has_encoder = any((index.get("image_encoder") or [None])[:1])
    if has_encoder:
        signs.append("it has an image_encoder")
    kind = _kind(configs, class_name=transformer.get("_class_name"), text_encoder=None)
    told = ("the transformer's class", _IMAGE)
    is_known = any(all(model.kind[key] == kind[key] for key in told) for model in known_models())
    needs_encoder = bool(transformer.get("image_dim")) or transformer.get("task_type") == "i2v"
    if not signs or (is_known and has_encoder == needs_encoder):
        return
    del kind["the text encoder"]
    model = next(iter(_matches({**kind, _IMAGE: _NO_IMAGE}, _sizes(transformer))), None) or _by_name(name)
    remedy = f"model={name}" if model is None else f"model={model.name} with {model.repository or 'its own folder'}"
    raise ValueError(
        f"{given} holds an image-to-video or control model ({'; '.join(signs[:2])}; its pipeline is "
        f"{index.get('_class_name')}) of a kind that qvgen does not have; use {remedy}"
    )


def _channels(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int]:
    """Channels of the VAE's latents, and of the transformer's input but those that text to video has zeros for."""
    latent = int(vae.get("z_dim", vae.get("latent_channels", 16)))
    return latent, latent if transformer.get("task_type") == "t2v" else int(transformer.get("in_channels", latent))


def _image_condition(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> str:
    """The form in which a transformer is given an image, at any number of latent channels."""
    latent, inputs = _channels(transformer, vae)
    mask = int(vae.get("scale_factor_temporal") or vae.get("temporal_compression_ratio") or 4)  # a channel a frame
    named = {0: [], latent: ["latents"], latent + 1: ["latents with a mask of one channel"]}
    named[latent + mask] = ["latents with a mask"]
    parts = named.get(inputs - latent, [f"{inputs - latent} channels"])
    return " and ".join([*parts, *(key for key in _CONDITIONS if transformer.get(key))]) or _NO_IMAGE


def check_is_of(configs: Configs, *, name: str, transformer_class: str, text_encoder: str, given: str) -> None:
    """Refuse a folder of another model than the one that was chosen.

    Args:
        configs: the folder's configurations.
        name: Name of the model that was chosen; one that conf/model does not know is not compared with others.
        transformer_class: Class of diffusers that the model's transformer has.
        text_encoder: class of transformers, of that model.
        given: How the user named it, for the message.

    Raises:
        ValueError: it is of another class, kind, or exactly of another model's sizes; the message names the model to use.
    """
    found_class = configs("transformer").get("_class_name", transformer_class)
    index = configs("model_index")
    encoder = (index.get("text_encoder") or [None, None])[1] or text_encoder
    kind = _kind(configs, class_name=found_class, text_encoder=encoder)
    sizes = _sizes(configs("transformer"))
    if found_class != transformer_class:
        raise ValueError(
            f"{given} holds a {found_class}, model={name} is a {transformer_class}; "
            + _remedy(_matches(kind, sizes), found_class)
        )
    own = _by_name(name)
    if own is None:
        return
    differences = [
        f"{key} is {value} there and {own.kind[key]} in model={name}"
        for key, value in kind.items()
        if value != own.kind[key]
    ]
    if differences:
        remedy = _remedy(_matches(kind, sizes), found_class)
        raise ValueError(f"{given} holds another model: {'; '.join(differences)}; {remedy}")
    twins = [model for model in _matches(kind, sizes) if model.sizes == sizes]
    if twins and own.sizes != sizes:
        shown = ", ".join(f"{key}={sizes[key]}" for key in sizes if sizes[key] != own.sizes.get(key))
        twin = twins[0]
        raise ValueError(f"{given} holds {twin.repository or twin.name} ({shown}); use model={twin.name}")


def _kind(configs: Configs, *, class_name: str | None, text_encoder: str | None) -> dict[str, Any]:
    """The values that tell models of one class apart at any size."""
    transformer, vae, index = configs("transformer"), configs("vae"), configs("model_index")
    temporal = transformer.get("patch_size_t")
    return {
        "the transformer's class": class_name,
        _IMAGE: _image_condition(transformer, vae),
        "the text encoder": text_encoder,
        "use_rotary_positional_embeddings": bool(transformer.get("use_rotary_positional_embeddings", False)),
        "patch_size_t": None if temporal is None else int(temporal),
        "the number of experts": 1 if index.get("boundary_ratio") is None else 2,
        "expand_timesteps": bool(index.get("expand_timesteps", False)),
        "the VAE's spatial compression": int(vae.get("scale_factor_spatial", 8)),
    }


def _sizes(transformer: Mapping[str, Any]) -> dict[str, Any]:
    return {key: transformer[key] for key in _SIZES if key in transformer}


def _matches(kind: Mapping[str, Any], sizes: Mapping[str, Any]) -> list[PublishedModel]:
    """Models of a kind, those without an image first; those of the very sizes alone where there are any."""
    same = [model for model in known_models() if all(model.kind[key] == kind[key] for key in kind)]
    same.sort(key=lambda model: model.takes_image)
    return [model for model in same if model.sizes == sizes] or same


def _remedy(models: Sequence[PublishedModel], class_name: str) -> str:
    if not models:
        return f"no model of qvgen is such a {class_name}; choose a folder of the model, or try model=diffusers"
    return f"use {' or '.join(f'model={model.name}' for model in models)}"


def _by_name(name: str) -> PublishedModel | None:
    return next((model for model in known_models() if model.name == name), None)


@cache
def known_models() -> tuple[PublishedModel, ...]:
    """The models of conf/model and of plug-ins that are folders; a family whose code can't be imported is none."""
    models = []
    for name in installed_names("model"):
        spec = yaml.safe_load(leaf_path("model", name).read_text(encoding="utf-8"))
        if "published" not in spec:
            continue
        module, _, class_name = spec["_target_"].rpartition(".")
        try:
            family: Any = getattr(import_module(module), class_name)
        except Exception:  # a plug-in's code, which may raise anything and is not asked for here
            if module.startswith("qvgen."):
                raise
            continue
        published = spec["published"]
        kind = _kind(
            lambda component, published=published: published.get(component, {}),
            class_name=family.transformer_class,
            text_encoder=family.text_encoder_class,
        )
        sizes = _sizes(published["transformer"])
        own = {
            "repository": spec.get("repository", ""),
            "takes_image": getattr(family, "takes_image", False),
            "own_classes": dict(getattr(family, "own_classes", {})),
        }
        models.append(PublishedModel(name=name, kind=kind, sizes=sizes, **own))
    return tuple(models)
