"""Generate videos by the ordinary pipeline: of a packed model, or of the full-precision one with the same seeds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qvgen import stop_request
from qvgen.config.prompt import PromptedVideo, Prompts
from qvgen.config.verb_schema import GenerateConfig
from qvgen.data.clip_report import warn_of_cut_captions
from qvgen.data.video import write_video
from qvgen.deploy.checkpoint import load_packed
from qvgen.deploy.delta_switch import DeltaSwitch, find_switch
from qvgen.deploy.kernel_choice import kernel_line
from qvgen.deploy.manifest import read_manifest
from qvgen.errors import DOES_NOT_FIT
from qvgen.evaluation.comparison import video_name
from qvgen.evaluation.placement import placed
from qvgen.models.base import local_arguments
from qvgen.training.identity import code_facts
from qvgen.training.planning.deployment import plan_generate
from qvgen.training.source_checksum import sources_of
from qvgen.verbs._earlier_result import refuse_earlier
from qvgen.verbs._packed_family import check_sampler, load_family
from qvgen.verbs._unfinished_videos import UnfinishedVideos

log = logging.getLogger(__name__)


def run(config: GenerateConfig) -> int | None:
    """Write one mp4 per caption and seed: the seed alone decides a video's noise, as it does for the teacher's.

    A call that was stopped is continued by the same command: videos that it wrote stay.

    Returns:
        The exit code of a dry run that does not fit; None otherwise.
    """
    family = load_family(config)
    request = read_request(config, family)
    check_sampler(config.packed, family, num_steps=request.num_steps, guidance_scale=request.guidance_scale)
    unfinished = UnfinishedVideos(config.out, lambda: _parts(config, family, request))
    missing, num_videos = missing_videos(config, request.videos, unfinished), len(request.videos)
    if config.dry_run:
        memory_lines, can_run = plan_generate(family, packed=config.packed or (), kernel=config.kernel)
        for line in [*plan(config, request, num_made=num_videos - len(missing)), *memory_lines]:
            print(line)
        return None if can_run else DOES_NOT_FIT
    _say_what_is_there(config, num_videos - len(missing), num_videos)
    transformer = _transformer(config, family)
    if hasattr(family, "to") and torch.cuda.is_available():
        family.to("cuda")
    conditions = {text: family.encode([text]) for text in request.texts}
    if hasattr(family, "release"):
        family.release()  # the text encoder: it may be as large as the transformer
    partner = _use_partner(config, family)
    switches = _switches(config, [transformer, *partner])
    if config.prompts is not None:
        log.info("%s", request.seeds_said)
    log.info("%s", request.negatives_said)
    if hasattr(family, "tokens_left_out"):
        warn_of_cut_captions(request.texts, tokens_left_out=family.tokens_left_out)
    config.out.mkdir(parents=True, exist_ok=True)

    def encode(texts: Any) -> dict[str, Any]:
        rows = [conditions[text] for text in texts]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    with placed(transformer) as device:
        _say_kernel(config, device)
        for done, (path, asked) in enumerate(missing.items(), start=num_videos - len(missing) + 1):
            video = family.generate(
                transformer,
                [asked.caption],
                [asked.seed],
                num_steps=request.num_steps,
                guidance_scale=request.guidance_scale,
                negative_prompts=[asked.negative],
                encode=encode,
            )[0]
            with stop_request.undivided():
                write_video(path, video.numpy(), fps=family.fps)
                unfinished.add(path, asked)
                print(path)
                _say_what_is_kept(config, done, num_videos)
    unfinished.finish()
    for switch in switches:
        widths, delta = list(switch.config.widths), switch.config.delta
        print(f"mean activation bits: {switch.mean_bits():.2f} (widths {widths}, delta {delta:g})")
    return None


def _say_kernel(config: GenerateConfig, device: torch.device) -> None:
    """Loading said what runs on the CPU; where videos are sampled elsewhere, that counts."""
    for path in (config.packed or ()) if device.type != "cpu" else ():
        log.info("%s: %s", path, kernel_line(read_manifest(path), kernel=config.kernel, device=device))


def _say_what_is_there(config: GenerateConfig, done: int, num_videos: int) -> None:
    if done:
        log.info("%d of %d videos are there, from a call that was stopped", done, num_videos)
    _say_what_is_kept(config, done, num_videos)


def _say_what_is_kept(config: GenerateConfig, done: int, num_videos: int) -> None:
    stop_request.note(f"after {done} of {num_videos} videos, which are in {config.out}")
    stop_request.continue_with({})


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is sampled, and how.

    Attributes:
        videos: One file each; their negative prompts are set.
        num_steps: Sampling steps.
        guidance_scale: Classifier-free guidance.
        num_own_seeds: Lines of a prompt file that name their seeds.
        num_lines: All lines.
        seeds: The command line's.
    """

    videos: tuple[PromptedVideo, ...]
    num_steps: int
    guidance_scale: float
    num_own_seeds: int
    num_lines: int
    seeds: tuple[int, ...]

    @property
    def texts(self) -> list[str]:
        """What has to be encoded, each once; without guidance no negative prompt."""
        negatives = [video.negative or "" for video in self.videos] if self.guidance_scale != 1 else []
        return list(dict.fromkeys([*(video.caption for video in self.videos), *negatives]))

    @property
    def seeds_said(self) -> str:
        """Whose seeds count, in words."""
        others = self.num_lines - self.num_own_seeds
        return (
            f"{self.num_own_seeds} prompts name their own seeds; seed={list(self.seeds)} counts for the other {others}"
        )

    @property
    def negatives_said(self) -> str:
        """Which negative prompts count, in words."""
        if self.guidance_scale == 1:
            return "guidance 1: no negative prompt counts"
        found = dict.fromkeys(video.negative or "" for video in self.videos)
        shown = " | ".join(repr(negative) if negative else "empty" for negative in list(found)[:3])
        return f"negative prompt: {shown}{f' and {len(found) - 3} more' if len(found) > 3 else ''}"


def read_request(config: GenerateConfig, family: Any) -> Request:
    """What the command line asks for, with what it leaves open filled in from the model.

    Raises:
        ValueError: A negative prompt without guidance.
    """
    prompts = config.prompts or Prompts.of(config.prompt or family.prompts)
    own = family.negative_prompt if config.negative_prompt is None else config.negative_prompt
    guidance_scale = family.guidance_scale if config.guidance_scale is None else config.guidance_scale
    if config.negative_prompt is not None and guidance_scale <= 1:
        raise ValueError(
            f"negative_prompt has no effect with guidance_scale={guidance_scale:g}, which is the model's; leave it out"
        )
    return Request(
        videos=tuple(
            replace(video, negative=own if video.negative is None else video.negative)
            for video in prompts.videos(config.seed)
        ),
        num_steps=config.num_steps or family.num_inference_steps,
        guidance_scale=guidance_scale,
        num_own_seeds=sum(bool(line.seeds) for line in prompts.lines),
        num_lines=len(prompts),
        seeds=config.seed,
    )


def missing_videos(
    config: GenerateConfig, videos: Sequence[PromptedVideo], unfinished: UnfinishedVideos
) -> dict[Path, PromptedVideo]:
    """The file of each video that is not there from a stopped call of the same command.

    Raises:
        ValueError: Some are there of another call, and are not to be replaced.
    """
    variant = "packed" if config.packed else "teacher"
    paths = {
        config.out / video_name(index, video.caption, seed=video.seed, variant=variant): video
        for index, video in enumerate(videos)
    }
    missing = {path: video for path, video in paths.items() if not unfinished.holds(path, video)}
    refuse_earlier(config.out, [path.name for path in missing], overwrite=config.overwrite)
    return missing


def _parts(config: GenerateConfig, family: Any, request: Request) -> list[Any]:
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


def plan(config: GenerateConfig, request: Request, *, num_made: int) -> list[str]:
    """What the verb would do; ``num_made`` videos are there, from a stopped call."""
    steps, guidance = request.num_steps, request.guidance_scale
    calls = steps * (1 if guidance == 1 else 2)
    seeds = len({video.seed for video in request.videos})
    return [
        f"{len(request.videos)} videos of {request.num_lines} captions and {seeds} seeds into {config.out}",
        *([f"a stopped call made {num_made} of them"] if num_made else []),
        *([request.seeds_said] if config.prompts is not None else []),
        f"{steps} sampling steps with guidance {guidance:g}: {calls} calls of the transformer for each video",
        request.negatives_said,
        f"transformer: {', '.join(map(str, config.packed)) if config.packed else f'full precision of {config.names.model}'}",
    ]
