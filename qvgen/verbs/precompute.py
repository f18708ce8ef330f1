"""Encode video files and captions once: VAE latents and text embeddings in a cache that training reads."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch

from qvgen import stop_request, work_item
from qvgen.config.build import build
from qvgen.config.processes import launched_world
from qvgen.config.processes.device_choice import say_chosen
from qvgen.config.processes.launched_world import LaunchedWorld
from qvgen.config.prompts.prompt import Prompts
from qvgen.config.schema.train import TrainConfig
from qvgen.config.schema.verbs import PrecomputeConfig
from qvgen.cpu_threads import set_threads
from qvgen.data.clip_report import FillReport
from qvgen.data.source import DataSource, EncodedSource
from qvgen.errors import UserError
from qvgen.run_directory import write_plain
from qvgen.training.distributed.child_command import worker_command
from qvgen.training.distributed.launcher import WorkerGroup

log = logging.getLogger(__name__)


def run(config: PrecomputeConfig) -> None:
    """Fill the cache with what is missing of this machine's share, or, as one of several tasks, of the task's own."""
    set_threads(config.threads)
    source, world = _clips(config), _world(config)
    if config.dry_run:
        if world is None or world.rank == 0:
            _show_plan(config, source, world)
        return
    say_chosen()
    began = time.monotonic()
    encoded, report = fill_all(config, source, world=world)
    if world is not None and world.rank:
        print(f"rank {world.rank} of {world.size}: {encoded} clips encoded by this process")
        return
    print(
        f"{report.encoded + report.reused} clips ready ({encoded} encoded by this process), {len(report.bad)} unusable, "
        f"{time.monotonic() - began:.1f} s; cache: {source.cache}"
    )
    if report.bad:
        print(f"unusable clips: {report.bad_report}")
    if report.complete:
        print(f"{report.left_out}; see {report.left_out_report}")
    else:
        print(f"not complete yet: other shares of num_shards={config.num_shards} are missing")


def _show_plan(config: PrecomputeConfig, source: EncodedSource, world: LaunchedWorld | None) -> None:
    processes = config.devices if world is None else world.size
    print(f"model {config.names.model}, {processes} process{'es' if processes > 1 else ''}")
    for line in source.describe_share(config.model, shard=config.shard, num_shards=config.num_shards):
        print(line)


def _world(config: PrecomputeConfig) -> LaunchedWorld | None:
    """The tasks of torchrun or SLURM that share out the clips; None: there is one, or num_shards says which are whose."""
    world = launched_world.current()
    return world if config.num_shards == 1 else None


def fill_missing(config: TrainConfig, *, texts: Sequence[str]) -> None:
    """Make the cache that a training run reads, where something of it is missing; nothing for data without one.

    Args:
        config: The run's.
        texts: Captions and negative prompts that it samples with, besides its clips' captions.
    """
    source = config.data
    if not source.encodes or config.dry_run or source.is_complete(config.model, captions=texts):
        return
    log.info("encoding %s into %s first", source.origin, source.cache)
    sections = {key: config.plain[key] for key in ("model", "data", "debug", "devices")}
    plain = {
        **sections,
        "prompts": [{"prompt": str(text)} for text in texts if text] or None,  # the empty one always is encoded
        "shard": 0,
        "num_shards": 1,
        "hang_minutes": config.training.hang_minutes,
        "threads": config.strategy.threads,
        "run_dir": f"{source.cache}/logs",
        "dry_run": False,
        "names": {"model": config.names.model, "data": config.names.data},
    }
    precompute = build("precompute", plain)
    fill_all(precompute, _clips(precompute))
    stop_request.note("after encoding, which is kept")


def fill_all(
    config: PrecomputeConfig, source: EncodedSource, *, world: LaunchedWorld | None = None
) -> tuple[int, FillReport]:
    """Fill a machine's share with all its processes, or one task's share of everything.

    Args:
        config: The verb's.
        source: The clips.
        world: The tasks that share them out; None: this process starts the others itself.

    Returns:
        How many clips this process encoded; and the report of the machine's share, in another task than rank 0 of its own.

    Raises:
        UserError: See :func:`qvgen.data.cache_fill.fill`.
        RuntimeError: A process died.
    """
    stop_request.note("while encoding, what is encoded is kept")
    stop_request.continue_with({})
    rest = {"captions": _texts(config), "shard": config.shard, "num_shards": config.num_shards}
    work_item.give_up_after(None if world is None else config.hang_minutes)
    if world is not None:
        mine = _fill_share(config, source, rank=world.rank, size=world.size)
        if world.rank:
            return mine.encoded, mine
        # What the others have not begun yet is rank 0's now; it waits for what they have, and for nobody who is gone.
        report = _on_gpu(config, 0, lambda: source.fill(config.model, **rest))
        return mine.encoded + report.encoded, report
    if config.devices == 1:
        report = _fill_share(config, source, rank=0, size=1)
        return report.encoded, report
    logs = config.run_dir
    logs.mkdir(parents=True, exist_ok=True)
    write_plain(logs / "worker.yaml", config.plain)
    command = worker_command("precompute", logs / "worker.yaml", config.plain)
    with WorkerGroup(
        command, world_size=config.devices, log_directory=logs, hang_minutes=config.hang_minutes, shares_items=True
    ) as group:
        mine = _fill_share(config, source, rank=0, size=config.devices)
        work_item.wait()
        group.join()
    # Every clip of this machine has a record now: going through them once more encodes nothing.
    return mine.encoded, source.fill(config.model, **rest)


def run_worker(config: PrecomputeConfig, *, rank: int, world_size: int, port: int) -> None:
    """Fill another process's share."""
    del port  # they need not speak to each other
    assert world_size == config.devices, f"{world_size} processes for devices={config.devices}"
    set_threads(config.threads)
    _fill_share(config, _clips(config), rank=rank, size=world_size)


def _clips(config: PrecomputeConfig) -> EncodedSource:
    """The run's source; raises ValueError where it has no cache or does not fit the model."""
    source: DataSource = config.data
    source.check(config.model)
    if not isinstance(source, EncodedSource):
        raise UserError(f"data={config.names.data} has nothing to encode; use data=clips data.path=FOLDER")
    return source


def _texts(config: PrecomputeConfig) -> list[str]:
    """What is encoded besides the clips' captions: the prompts, and all negative prompts, whatever guidance may be later."""
    prompts = config.prompts or Prompts.of(config.model.prompts)
    return list(dict.fromkeys([*prompts.texts(), config.model.negative_prompt]))


def _fill_share(config: PrecomputeConfig, source: EncodedSource, *, rank: int, size: int) -> FillReport:
    """One process's share: clips shard, shard + num_shards, ..., of which every size-th."""
    world = launched_world.current()
    return _on_gpu(
        config,
        rank if world is None else world.local_rank,
        lambda: source.fill(
            config.model,
            captions=_texts(config),
            shard=config.shard + config.num_shards * rank,
            num_shards=config.num_shards * size,
        ),
    )


def _on_gpu(config: PrecomputeConfig, number: int, fill: Callable[[], FillReport]) -> FillReport:
    """Fill with the encoders on a GPU, where there is one, and let go of them."""
    family = config.model
    if torch.cuda.is_available():
        family.to(torch.device("cuda", number % torch.cuda.device_count()))
    try:
        return fill()
    finally:
        family.release()
