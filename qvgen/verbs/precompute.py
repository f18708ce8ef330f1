"""Encode video files and captions once: VAE latents and text embeddings in a cache that training reads."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch

from qvgen import stop_request
from qvgen.config.build import build
from qvgen.config.prompt import Prompts
from qvgen.config.schema import TrainConfig
from qvgen.config.verb_schema import PrecomputeConfig
from qvgen.cpu_threads import set_threads
from qvgen.data.clip_report import FillReport
from qvgen.data.source import DataSource, EncodedSource
from qvgen.errors import UserError
from qvgen.run_directory import write_plain
from qvgen.training.distributed.launcher import WorkerGroup, worker_command

log = logging.getLogger(__name__)


def run(config: PrecomputeConfig) -> None:
    """Fill the cache with what is missing of this machine's share."""
    set_threads(config.threads)
    source = _clips(config)
    if config.dry_run:
        processes = f"{config.devices} process{'es' if config.devices > 1 else ''}"
        print(f"model {config.names.model}, {processes}")
        for line in source.describe_share(config.model, shard=config.shard, num_shards=config.num_shards):
            print(line)
        return
    began = time.monotonic()
    encoded, report = fill_all(config, source)
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
        "prompts": [{"prompt": text} for text in texts if text] or None,  # the empty one always is encoded
        "shard": 0,
        "num_shards": 1,
        "threads": config.strategy.threads,
        "run_dir": f"{source.cache}/logs",
        "dry_run": False,
        "names": {"model": config.names.model, "data": config.names.data},
    }
    precompute = build("precompute", plain)
    fill_all(precompute, _clips(precompute))
    stop_request.note("after encoding, which is kept")


def fill_all(config: PrecomputeConfig, source: EncodedSource) -> tuple[int, FillReport]:
    """Fill a machine's share with all its processes.

    Returns:
        How many clips this process encoded, and the report of the whole share.

    Raises:
        UserError: See :func:`qvgen.data.cache_fill.fill`.
        RuntimeError: A process died.
    """
    stop_request.note("while encoding, what is encoded is kept")
    stop_request.continue_with({})
    if config.devices == 1:
        report = _fill_share(config, source, rank=0)
        return report.encoded, report
    logs = config.run_dir
    logs.mkdir(parents=True, exist_ok=True)
    write_plain(logs / "worker.yaml", config.plain)
    command = worker_command("precompute", logs / "worker.yaml", config.plain)
    with WorkerGroup(command, world_size=config.devices, log_directory=logs) as group:
        mine = _fill_share(config, source, rank=0)
        group.join()
    # Every clip of this machine has a record now: going through them once more encodes nothing.
    shares = {"shard": config.shard, "num_shards": config.num_shards}
    return mine.encoded, source.fill(config.model, captions=_texts(config), **shares)


def run_worker(config: PrecomputeConfig, *, rank: int, world_size: int, port: int) -> None:
    """Fill another process's share."""
    del port  # they need not speak to each other
    assert world_size == config.devices, f"{world_size} processes for devices={config.devices}"
    set_threads(config.threads)
    _fill_share(config, _clips(config), rank=rank)


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


def _fill_share(config: PrecomputeConfig, source: EncodedSource, *, rank: int) -> FillReport:
    """One process's share: clips shard, shard + num_shards, ..., of which every devices-th."""
    family = config.model
    if torch.cuda.is_available():
        family.to(torch.device("cuda", rank % torch.cuda.device_count()))
    try:
        return source.fill(
            family,
            captions=_texts(config),
            shard=config.shard + config.num_shards * rank,
            num_shards=config.num_shards * config.devices,
        )
    finally:
        family.release()
