"""Several processes that sample the videos of one command: started, and told which model can share a video out.

With ``context_parallel=1`` each samples whole videos; with C, groups of C share a video's tokens
(:mod:`qvgen.training.distributed.video_group`), of models whose training can do that too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from qvgen import work_item
from qvgen.config.schema.evaluate import EvaluateConfig
from qvgen.config.schema.verbs import GenerateConfig
from qvgen.deploy.manifest import read_manifest
from qvgen.errors import UserError
from qvgen.evaluation.placement import sampling_device
from qvgen.models.context_parallel import check_context
from qvgen.run_directory import write_plain
from qvgen.training.distributed.ahead import LOG_FOLDER, WORKER_FILE
from qvgen.training.distributed.child_command import worker_command
from qvgen.training.distributed.launcher import WorkerGroup
from qvgen.training.distributed.plain_group import COLLECTIVE_TIMEOUT, joined_group
from qvgen.training.distributed.video_group import VideoGroup


def use_own_gpu(rank: int) -> None:
    """Compute on the GPU of this process's number, where there are any."""
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())


@contextmanager
def started_workers(verb: str, config: GenerateConfig | EvaluateConfig) -> Iterator[WorkerGroup]:
    """Start the other processes of a command, and wait for them behind the block.

    Args:
        verb: Its module has a ``run_worker``.
        config: More than one device; logs go to a folder in its ``out``.
    """
    logs = config.out / LOG_FOLDER
    logs.mkdir(parents=True, exist_ok=True)
    write_plain(logs / WORKER_FILE, config.plain)
    command = worker_command(verb, logs / WORKER_FILE, config.plain)
    size, minutes = config.devices, config.hang_minutes
    with WorkerGroup(command, world_size=size, log_directory=logs, hang_minutes=minutes, shares_items=True) as group:
        yield group
        work_item.wait()
        group.join()


@contextmanager
def joined_videos(config: GenerateConfig | EvaluateConfig, *, rank: int, port: int) -> Iterator[VideoGroup]:
    """Take part in the sampling, as one of the processes; a collective of all."""
    use_own_gpu(rank)
    with joined_group(rank=rank, world_size=config.devices, port=port):
        yield VideoGroup(config.context_parallel, device=sampling_device(), timeout=COLLECTIVE_TIMEOUT)


def check_shared_videos(config: GenerateConfig, family: Any) -> None:
    """Refuse models whose videos so many processes can't sample together; reads no weights.

    Raises:
        UserError: See :func:`qvgen.models.context_parallel.check_context`, or an attention or timesteps that can't.
    """
    processes = config.context_parallel
    if processes == 1:
        return
    given = f"context_parallel={processes} and model={family.name}"
    for path in config.packed or ():
        if attentions := read_manifest(path).attentions:
            raise UserError(
                f"{given}: {path} has {len(attentions)} attentions in 8 bits, and that of a shared sequence is diffusers' "
                "own; leave context_parallel out"
            )
    if getattr(family, "steps_by_token", False):
        raise UserError(
            f"{given}: it is sampled with a timestep for each token, which is not held against one process; leave "
            "context_parallel out"
        )
    frames = getattr(family, "sampling_frames", None)
    check_context(
        getattr(family, "transformer_class", type(family).__name__),
        numbers=getattr(family, "transformer_config", {}),
        shapes=[(family if frames is None else replace(family, num_frames=frames)).sample_shape],
        processes=processes,
        name=family.name,
        remedy="another size of the videos",
        key="context_parallel",
    )


def groups_said(devices: int, context_parallel: int) -> list[str]:
    """A plan's line about who samples; none of one process."""
    if devices == 1:
        return []
    if context_parallel == 1:
        return [f"{devices} processes share the videos out"]
    return [f"{devices} processes: groups of {context_parallel}, each of which shares one video's tokens out"]
