"""The model family of a packed directory, for verbs that sample videos: what its manifest and the command line say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qvgen.config.leaves import build_leaf, load_foreign_leaf, load_leaf
from qvgen.config.schema.verbs import GenerateConfig
from qvgen.deploy.manifest import Manifest, read_manifest


def _with_named_class(config: GenerateConfig, arguments: Mapping[str, Any]) -> Any:
    """The family of a class that the command line names in place of a file's, as the run's did; None where it names none."""
    if config.model is None or not any(text.lstrip("+").startswith("model._target_=") for text in config.typed):
        return None
    spec = {key: value for key, value in config.model.items() if key != "recipe"}
    return build_leaf({**spec, **arguments}, key="model", trusted=[str(spec["_target_"])])


def load_family(config: GenerateConfig) -> Any:
    """The model family: what the packed directory says of it, but for what the command line says.

    Raises:
        ValueError: Neither names a model, or they name different ones.
    """
    manifests = [read_manifest(path) for path in config.packed or ()]
    named = {manifest.base_name for manifest in manifests} | ({config.names.model} - {None})
    if "" in named:
        raise ValueError(f"{config.packed} does not say which model it was made from; load it with qvgen.load_packed")
    if len(named) != 1:
        raise ValueError(
            f"packed and model name {', '.join(sorted(named)) or 'no model'}; give packed=DIR, or model=NAME and model.path"
        )
    _check_experts(manifests)
    arguments = dict(manifests[0].base_arguments) if manifests else {}
    for override in config.typed:
        section, _, key = override.lstrip("+").partition("=")[0].partition(".")
        if section == "model" and key and key != "_target_":
            name = key.partition(".")[0]
            assert config.model is not None, "a key of a section that was chosen"
            arguments[name] = config.model[name]
    if (family := _with_named_class(config, arguments)) is not None:
        return family
    if not manifests:
        return load_leaf("model", named.pop(), **arguments)
    return load_foreign_leaf("model", named.pop(), arguments, source=" and ".join(map(str, config.packed or ())))


def check_sampler(packed: Sequence[Path] | None, family: Any, *, num_steps: int, guidance_scale: float) -> None:
    """Raise ValueError where an imported model's clips are laid out for another sampler than the one that is asked for.

    Each call would be refused too, but for those of a sampler that visits some of the same timesteps: there the release would
    have taken other clips.
    """
    for manifest in map(read_manifest, packed or ()):
        if manifest.guided and guidance_scale <= 1:
            raise ValueError(
                f"guidance_scale={guidance_scale:g} makes one call a step, and the packed model has clips for two; "
                "sample with guidance_scale above 1, or import the checkpoint again with clips=last or clips=mean"
            )
        by_step = manifest.timesteps is not None and not any(layer.form.static for layer in manifest.layers)
        if not by_step or not manifest.strict_timesteps or not hasattr(family, "scheduler"):
            continue
        scheduler, wanted = family.scheduler(), list(manifest.timesteps or ())
        scheduler.set_timesteps(num_steps)
        if sorted(float(timestep) for timestep in scheduler.timesteps) == wanted:
            continue
        said = manifest.training.get("clips")
        raise ValueError(
            f"the packed model has clips for {said or f'{len(wanted)} steps of one sampler'}, and num_steps={num_steps} of "
            f"this {type(scheduler).__name__} visits other timesteps; sample with num_steps={len(wanted)} and that one, "
            f"or import the checkpoint again with num_steps={num_steps}, or with clips=mean, which any sampler may use"
        )


def _check_experts(manifests: list[Manifest]) -> None:
    if len(manifests) > 1:
        experts = [manifest.base_arguments.get("expert") for manifest in manifests]
        if sorted(map(str, experts)) != ["high", "low"]:
            raise ValueError(f"packed=[...] holds the experts {experts}; give one high and one low, or one directory")
