"""The model that a command names, ready to sample videos: its transformer, a second expert, captions encoded."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from qvgen import work_item
from qvgen.config.prompts.prompt import PromptedVideo
from qvgen.config.schema.verbs import GenerateConfig
from qvgen.data.clip_report import warn_of_cut_captions
from qvgen.deploy.checkpoint import load_packed
from qvgen.deploy.delta_switch import DeltaSwitch, find_switch
from qvgen.deploy.kernel_choice import kernel_line
from qvgen.deploy.manifest import read_manifest
from qvgen.evaluation.placement import placed
from qvgen.models.base import local_arguments
from qvgen.training.distributed.video_group import VideoGroup
from qvgen.training.identity import code_facts
from qvgen.training.source_checksum import sources_of
from qvgen.verbs._video_request import Request

log = logging.getLogger(__name__)

Place = TypeVar("Place")


class VideoSampler:
    """A packed model or the full-precision one, loaded.

    Args:
        config: Says which, and how it runs.
        family: The model family.
        request: What will be sampled: all its texts are encoded at once, and the text encoder is freed.

    Attributes:
        family: The model family.
        transformer: The model.
        group: The processes that sample a video together, where it is set.
        switches: Policies that switch its widths while it samples.
    """

    def __init__(self, config: GenerateConfig, family: Any, request: Request) -> None:
        self._config, self.family, self._request = config, family, request
        self.group: VideoGroup | None = None
        self.transformer = _transformer(config, family)
        if hasattr(family, "to") and torch.cuda.is_available():
            family.to("cuda")
        self._conditions = {text: family.encode([text]) for text in request.texts}
        if hasattr(family, "release"):
            family.release()  # the text encoder: it may be as large as the transformer
        partner = _use_partner(config, family)
        self.switches = _switches(config, [self.transformer, *partner])
        if hasattr(family, "tokens_left_out"):
            warn_of_cut_captions(request.texts, tokens_left_out=family.tokens_left_out)

    def sample(
        self, videos: Iterable[tuple[Place, PromptedVideo]]
    ) -> Iterator[tuple[Place, PromptedVideo, np.ndarray]]:
        """The videos one after the other, uint8 [F, H, W, 3]: each alone, so that none depends on the others."""
        with self.in_place():
            for place, asked in videos:
                work_item.begin(f"video {place.name if isinstance(place, Path) else asked.caption}")
                yield place, asked, self.sample_one(asked).numpy()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Bring the transformer to where it samples while the block runs, and say by which kernel."""
        with placed(self.transformer) as device:
            self._say_kernel(device)
            shared = nullcontext() if self.group is None else self.group.shared(self.transformers)
            with shared, work_item.heard_of(self.transformers):
                yield

    @property
    def transformers(self) -> list[nn.Module]:
        """The model, and the second expert that it is sampled with, if there is one, beside it."""
        partner = [self.family.partner(self.transformer)] if hasattr(self.family, "partner") else []
        return [self.transformer, *partner]

    def sample_one(self, asked: PromptedVideo) -> Tensor:
        """One video, uint8 [F, H, W, 3]; the transformer is in place (:meth:`in_place`)."""
        found: Tensor = self.family.generate(
            self.transformer,
            [asked.caption],
            [asked.seed],
            num_steps=self._request.num_steps,
            guidance_scale=self._request.guidance_scale,
            negative_prompts=[asked.negative],
            encode=self._encode,
        )[0]
        return found

    def _encode(self, texts: Any) -> dict[str, Any]:
        rows = [self._conditions[text] for text in texts]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _say_kernel(self, device: torch.device) -> None:
        """Loading said what runs on the CPU; where videos are sampled elsewhere, that counts."""
        for path in (self._config.packed or ()) if device.type != "cpu" else ():
            log.info("%s: %s", path, kernel_line(read_manifest(path), kernel=self._config.kernel, device=device))


def made_from(config: GenerateConfig, family: Any, request: Request) -> list[Any]:
    """All that a video is made from besides its caption, seed and negative prompt."""
    revisions = [read_manifest(path).to_json().decode() for path in config.packed or ()]
    if config.packed is None:
        revisions.append(family.revision)
    if getattr(family, "folder", None) is not None:
        transformers = [] if config.packed else [family.component_revision(name) for name in family.transformer_folders]
        revisions += [*transformers, family.latent_revision, family.text_revision]
    local = local_arguments(family)
    model = config.model and {key: value for key, value in config.model.items() if key not in local}
    settings = [request.num_steps, request.guidance_scale, config.delta, config.kernel, config.fused_norms]
    return [code_facts({}), sources_of(family), config.names.model, model, revisions, settings]


def _transformer(config: GenerateConfig, family: Any) -> nn.Module:
    if not config.packed:
        teacher: nn.Module = family.load_teacher()
        return teacher
    return load_packed(config.packed[0], kernel=config.kernel, fused_norms=config.fused_norms)


def _use_partner(config: GenerateConfig, family: Any) -> list[nn.Module]:
    """Make the second of two packed experts known to the family; it, if there is one."""
    partners = [
        load_packed(path, kernel=config.kernel, fused_norms=config.fused_norms) for path in (config.packed or ())[1:]
    ]
    if config.packed and not partners and hasattr(family, "partner_lora_is_missing"):
        record = read_manifest(config.packed[0]).training.get("loras")
        if family.partner_lora_is_missing(record):
            log.warning(
                "the other expert had a LoRA when %s was made and has none here; write model.lora_high or model.lora_low "
                "as it was there",
                config.packed[0],
            )
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
