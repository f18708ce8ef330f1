"""Generate videos by the ordinary pipeline: of a packed model, or of the full-precision one with the same seeds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from qvgen import stop_request
from qvgen.config.prompt import PromptedVideo
from qvgen.config.verb_schema import GenerateConfig
from qvgen.data.video import write_video
from qvgen.errors import DOES_NOT_FIT
from qvgen.evaluation.comparison import video_name
from qvgen.training.planning.deployment import plan_generate
from qvgen.verbs._earlier_result import refuse_earlier
from qvgen.verbs._packed_family import check_sampler, load_family
from qvgen.verbs._unfinished_videos import UnfinishedVideos
from qvgen.verbs._video_request import Request, read_request
from qvgen.verbs._video_sampler import VideoSampler, made_from

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
    unfinished = UnfinishedVideos(config.out, lambda: made_from(config, family, request))
    missing, num_videos = missing_videos(config, request.videos, unfinished), len(request.videos)
    if config.dry_run:
        memory_lines, can_run = plan_generate(family, packed=config.packed or (), kernel=config.kernel)
        for line in [*plan(config, request, num_made=num_videos - len(missing)), *memory_lines]:
            print(line)
        return None if can_run else DOES_NOT_FIT
    _say_what_is_there(config, num_videos - len(missing), num_videos)
    sampler = VideoSampler(config, family, request)
    if config.prompts is not None:
        log.info("%s", request.seeds_said)
    log.info("%s", request.negatives_said)
    config.out.mkdir(parents=True, exist_ok=True)
    for done, (path, asked, video) in enumerate(sampler.sample(missing), start=num_videos - len(missing) + 1):
        with stop_request.undivided():
            write_video(path, video, fps=family.fps)
            unfinished.add(path, asked)
            print(path)
            _say_what_is_kept(config, done, num_videos)
    unfinished.finish()
    for switch in sampler.switches:
        widths, delta = list(switch.config.widths), switch.config.delta
        print(f"mean activation bits: {switch.mean_bits():.2f} (widths {widths}, delta {delta:g})")
    return None


def _say_what_is_there(config: GenerateConfig, done: int, num_videos: int) -> None:
    if done:
        log.info("%d of %d videos are there, from a call that was stopped", done, num_videos)
    _say_what_is_kept(config, done, num_videos)


def _say_what_is_kept(config: GenerateConfig, done: int, num_videos: int) -> None:
    stop_request.note(f"after {done} of {num_videos} videos, which are in {config.out}")
    stop_request.continue_with({})


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
