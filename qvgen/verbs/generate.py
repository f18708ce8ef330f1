"""Generate videos by the ordinary pipeline: of a packed model, or of the full-precision one with the same seeds."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qvgen.config.errors import DOES_NOT_FIT
from qvgen.config.leaves import load_leaf
from qvgen.config.verb_schema import GenerateConfig
from qvgen.data.video import write_video
from qvgen.deploy.checkpoint import load_packed
from qvgen.deploy.delta_switch import DeltaSwitch, find_switch
from qvgen.deploy.manifest import Manifest, read_manifest
from qvgen.evaluation.comparison import video_name
from qvgen.evaluation.placement import placed
from qvgen.training.plan_verbs import plan_generate

log = logging.getLogger(__name__)


def run(config: GenerateConfig) -> int | None:
    """Write one mp4 per caption and seed: the seed alone decides a video's noise, as it does for the teacher's.

    Returns:
        The exit code of a dry run that does not fit; None otherwise.
    """
    family = load_family(config)
    captions = list(config.prompt or family.prompts)
    num_steps = config.num_steps or family.num_inference_steps
    guidance_scale = family.guidance_scale if config.guidance_scale is None else config.guidance_scale
    if config.dry_run:
        lines = plan(config, captions=captions, num_steps=num_steps, guidance_scale=guidance_scale)
        memory_lines, can_run = plan_generate(family, packed=config.packed or ())
        for line in [*lines, *memory_lines]:
            print(line)
        return None if can_run else DOES_NOT_FIT
    transformer = _transformer(config, family)
    if hasattr(family, "to") and torch.cuda.is_available():
        family.to("cuda")
    conditions = {caption: family.encode([caption]) for caption in dict.fromkeys([*captions, ""])}
    if hasattr(family, "release"):
        family.release()  # the text encoder: it may be as large as the transformer
    partner = _use_partner(config, family)
    switches = _switches(config, [transformer, *partner])
    config.out.mkdir(parents=True, exist_ok=True)
    variant = "packed" if config.packed else "teacher"

    def encode(texts: Any) -> dict[str, Any]:
        rows = [conditions[text] for text in texts]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    with placed(transformer):
        for index, (caption, seed) in enumerate((caption, seed) for caption in captions for seed in config.seed):
            video = family.generate(
                transformer, [caption], [seed], num_steps=num_steps, guidance_scale=guidance_scale, encode=encode
            )[0]
            path = config.out / video_name(index, caption, seed=seed, variant=variant)
            write_video(path, video.numpy(), fps=family.fps)
            print(path)
    for switch in switches:
        widths, delta = list(switch.config.widths), switch.config.delta
        print(f"mean activation bits: {switch.mean_bits():.2f} (widths {widths}, delta {delta:g})")
    return None


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
        if section == "model" and key:
            name = key.partition(".")[0]
            assert config.model is not None, "a key of a section that was chosen"
            arguments[name] = config.model[name]
    return load_leaf("model", named.pop(), **arguments)


def _check_experts(manifests: list[Manifest]) -> None:
    if len(manifests) > 1:
        experts = [manifest.base_arguments.get("expert") for manifest in manifests]
        if sorted(map(str, experts)) != ["high", "low"]:
            raise ValueError(f"packed=[...] holds the experts {experts}; give one high and one low, or one directory")


def _transformer(config: GenerateConfig, family: Any) -> nn.Module:
    transformer: nn.Module = (
        load_packed(config.packed[0], kernel=config.kernel) if config.packed else family.load_teacher()
    )
    return transformer


def _use_partner(config: GenerateConfig, family: Any) -> list[nn.Module]:
    """Make the second of two packed experts known to the family; it, if there is one."""
    partners = [load_packed(path, kernel=config.kernel) for path in (config.packed or ())[1:]]
    for partner in partners:
        family.use_partner(partner)
    return partners


def _switches(config: GenerateConfig, transformers: list[nn.Module]) -> list[DeltaSwitch]:
    """The policies of the transformers, with the delta that was asked for.

    Raises:
        ValueError: A delta for a transformer that has no policy.
    """
    found = [find_switch(transformer) for transformer in transformers]
    if config.delta is not None:
        if None in found:
            raise ValueError(
                f"delta={config.delta:g} is for packed models whose activations switch widths; this one was made without "
                "activation_switch.widths"
            )
        for switch in found:
            if switch is not None:
                switch.config = replace(switch.config, delta=config.delta)
    return [switch for switch in found if switch is not None]


def plan(config: GenerateConfig, *, captions: list[str], num_steps: int, guidance_scale: float) -> list[str]:
    """What the verb would do."""
    videos = len(captions) * len(config.seed)
    calls = num_steps * (1 if guidance_scale == 1 else 2)
    return [
        f"{videos} videos of {len(captions)} captions and {len(config.seed)} seeds into {config.out}",
        f"{num_steps} sampling steps with guidance {guidance_scale:g}: {calls} calls of the transformer for each video",
        f"transformer: {', '.join(map(str, config.packed)) if config.packed else f'full precision of {config.names.model}'}",
    ]
