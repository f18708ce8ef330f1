"""The request of a verb that samples videos: captions, seeds and negative prompts, steps and guidance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qvgen.config.prompts.image_prompt import image_of, with_image
from qvgen.config.prompts.prompt import PromptedVideo, Prompts
from qvgen.config.schema.verbs import GenerateConfig
from qvgen.models.few_step import check_sampled_as_distilled
from qvgen.models.given_image import check_images


@dataclass(frozen=True, kw_only=True)
class Request:
    """The videos that are sampled, and how.

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
        """The texts that have to be encoded, each once; without guidance no negative prompt."""
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
    """The request of the command line, with what it leaves open filled in from the model.

    Raises:
        ValueError: A negative prompt without guidance, steps or guidance that a few-step model was not made for, or an image
            that is missing or of no use.
    """
    prompts = config.prompts or Prompts.of(config.prompt or family.prompts)
    own = family.negative_prompt if config.negative_prompt is None else config.negative_prompt
    guidance_scale = family.guidance_scale if config.guidance_scale is None else config.guidance_scale
    num_steps = config.num_steps or family.num_inference_steps
    check_sampled_as_distilled(family, num_steps=num_steps, guidance_scale=guidance_scale)
    if config.negative_prompt is not None and guidance_scale <= 1:
        raise ValueError(
            f"negative_prompt has no effect with guidance_scale={guidance_scale:g}, which is the model's; leave it out"
        )
    videos = tuple(
        replace(
            video,
            negative=own if video.negative is None else video.negative,
            caption=video.caption if image_of(video.caption) else with_image(video.caption, config.image),
        )
        for video in prompts.videos(config.seed)
    )
    check_images(family, [video.caption for video in videos], key="prompts")
    return Request(
        videos=videos,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        num_own_seeds=sum(bool(line.seeds) for line in prompts.lines),
        num_lines=len(prompts),
        seeds=config.seed,
    )
