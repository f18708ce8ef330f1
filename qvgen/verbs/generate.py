"""Generate videos by the ordinary pipeline: of a packed model, or of the full-precision one with the same seeds."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from qvgen import stop_request, work_item
from qvgen.config.processes.device_choice import say_chosen
from qvgen.config.prompts.prompt import PromptedVideo
from qvgen.config.schema.verbs import GenerateConfig
from qvgen.data.video import write_video
from qvgen.deploy.delta_switch import DeltaSwitch
from qvgen.errors import DOES_NOT_FIT
from qvgen.evaluation.comparison import video_name
from qvgen.training.distributed.store_exchange import default_store
from qvgen.training.distributed.store_queue import StoreQueue
from qvgen.training.distributed.video_group import VideoGroup, gathered, said_by_rank_0
from qvgen.training.planning.deployment import plan_generate
from qvgen.verbs._earlier_result import refuse_earlier
from qvgen.verbs._packed_family import check_sampler, load_family
from qvgen.verbs._shared_videos import check_shared_videos, groups_said, joined_videos, started_workers
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
    check_shared_videos(config, family)
    work = _Work(config, family, request)
    missing, num_videos = missing_videos(config, request.videos, work.unfinished), len(request.videos)
    if config.dry_run:
        memory_lines, can_run = plan_generate(family, packed=config.packed or (), kernel=config.kernel)
        for line in [*plan(config, request, num_made=num_videos - len(missing)), *memory_lines]:
            print(line)
        return None if can_run else DOES_NOT_FIT
    say_chosen()
    _say_what_is_there(config, num_videos - len(missing), num_videos)
    if config.devices == 1:
        histories = work.do(missing.items())
    else:
        with started_workers("generate", config) as workers, joined_videos(config, rank=0, port=workers.port) as group:
            histories = work.do_share(missing, group)
    work.unfinished.finish()
    for switch, history in zip(work.switches, histories, strict=True):
        widths, delta = list(switch.config.widths), switch.config.delta
        if history:  # nothing was sampled where all videos were there
            print(f"mean activation bits: {sum(history) / len(history):.2f} (widths {widths}, delta {delta:g})")
    return None


def run_worker(config: GenerateConfig, *, rank: int, world_size: int, port: int) -> None:
    """Do another process's part."""
    assert world_size == config.devices, f"{world_size} processes for devices={config.devices}"
    family = load_family(config)
    with joined_videos(config, rank=rank, port=port) as group:
        _Work(config, family, read_request(config, family), number=group.number).do_share({}, group)


class _Work:
    """The videos that one process samples and writes.

    Args:
        config: The verb's.
        family: The model family.
        request: What is asked for.
        number: Which of several processes that write videos this is.

    Attributes:
        unfinished: The record of what was written.
        switches: Policies that switched the model's widths, once it has sampled.
    """

    def __init__(self, config: GenerateConfig, family: Any, request: Request, *, number: int = 0) -> None:
        self._config, self._family, self._request = config, family, request
        self.unfinished = UnfinishedVideos(config.out, lambda: made_from(config, family, request), number=number)
        self.switches: list[DeltaSwitch] = []

    def do_share(self, missing: Mapping[Path, PromptedVideo], group: VideoGroup) -> list[list[int]]:
        """Do one of several processes' share: its group's videos, whichever are not taken yet.

        Args:
            missing: Rank 0's, which count for all.
            group: This process's.

        Returns:
            See :meth:`do`, of all processes; as rank 0.
        """
        paths = said_by_rank_0(list(missing))
        videos = file_names(self._config, self._request.videos)
        todo = [(path, videos[path]) for path in paths]
        queue = StoreQueue(default_store(), num_processes=self._config.devices)

        def taken() -> Iterator[tuple[Path, PromptedVideo]]:
            while (number := queue.take("videos")) < len(todo):
                yield todo[number]

        own = self.do(group.together(taken(), among=todo), group=group)
        work_item.wait()
        histories = gathered(own if group.is_first else [[] for _ in own])
        return [list(chain.from_iterable(parts)) for parts in zip(*histories, strict=True)]

    def do(self, videos: Iterable[tuple[Path, PromptedVideo]], *, group: VideoGroup | None = None) -> list[list[int]]:
        """Sample videos one after the other, and write each where this process is the one that does.

        Returns:
            For each of the policies the widths that it chose.
        """
        config, request, num_videos = self._config, self._request, len(self._request.videos)
        sampler = VideoSampler(config, self._family, request)
        sampler.group, self.switches = group, sampler.switches
        if config.prompts is not None:
            log.info("%s", request.seeds_said)
        log.info("%s", request.negatives_said)
        config.out.mkdir(parents=True, exist_ok=True)
        for path, asked, video in sampler.sample(videos):
            if group is not None and not group.is_first:
                continue
            with stop_request.undivided():
                write_video(path, video, fps=self._family.fps)
                self.unfinished.add(path, asked)
                print(path)
                _say_what_is_kept(config, self.unfinished.count(), num_videos)
        return [switch.history for switch in sampler.switches]


def _say_what_is_there(config: GenerateConfig, done: int, num_videos: int) -> None:
    if done:
        log.info("%d of %d videos are there, from a call that was stopped", done, num_videos)
    _say_what_is_kept(config, done, num_videos)


def _say_what_is_kept(config: GenerateConfig, done: int, num_videos: int) -> None:
    stop_request.note(f"after {done} of {num_videos} videos, which are in {config.out}")
    stop_request.continue_with({})


def file_names(config: GenerateConfig, videos: Sequence[PromptedVideo]) -> dict[Path, PromptedVideo]:
    """The file of each video."""
    variant = "packed" if config.packed else "teacher"
    return {
        config.out / video_name(index, video.caption, seed=video.seed, variant=variant): video
        for index, video in enumerate(videos)
    }


def missing_videos(
    config: GenerateConfig, videos: Sequence[PromptedVideo], unfinished: UnfinishedVideos
) -> dict[Path, PromptedVideo]:
    """The file of each video that is not there from a stopped call of the same command.

    Raises:
        ValueError: Some are there of another call, and are not to be replaced.
    """
    paths = file_names(config, videos)
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
        *groups_said(config.devices, config.context_parallel),
        *([request.seeds_said] if config.prompts is not None else []),
        f"{steps} sampling steps with guidance {guidance:g}: {calls} calls of the transformer for each video",
        request.negatives_said,
        f"transformer: {', '.join(map(str, config.packed)) if config.packed else f'full precision of {config.names.model}'}",
    ]
