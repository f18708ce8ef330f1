"""Videos and held-out outputs at the end of a run, which all of its processes compute: the part of each process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

from torch import nn

from qvgen.config.schema.train import TrainConfig
from qvgen.deploy.checkpoint import load_packed
from qvgen.evaluation.comparison import COMPARED_STAGE, MEASURED, START, START_STAGE, open_compared
from qvgen.evaluation.held_out import HELD_OUT_SEED, MeasuredInputs
from qvgen.evaluation.item_queue import OneProcess
from qvgen.evaluation.kept_samples import KeptSamples, samples_key
from qvgen.evaluation.placement import sampling_device
from qvgen.evaluation.prompts import shown_videos
from qvgen.evaluation.sampling import held_out_items
from qvgen.evaluation.shared_sampling import Asked, ModelAbsentError, SharedSampling
from qvgen.layers.swap import phi_suspended
from qvgen.training.distributed import heartbeat
from qvgen.training.distributed.store_queue import StoreQueue
from qvgen.training.start.file import START_FILE, load_start
from qvgen.training.stop_point import interruptible
from qvgen.verbs._inputs import open_held_out


def begin_sampling(
    config: TrainConfig, path: Path, *, held_out: MeasuredInputs, measured: Sequence[str], queue: StoreQueue | None
) -> SharedSampling:
    """As rank 0, when the packed directory is written: rank 0's part, and the beginning of those of the others.

    Args:
        config: The run's.
        path: The run's folder.
        held_out: The inputs that models are measured on, and captions of the table's videos.
        measured: Models whose outputs for the inputs are still to be computed.
        queue: What the processes share out by; None: there is one.
    """
    key = samples_key(path, settings=config.plain, revision=config.model.revision)
    if queue is not None:
        queue.begin(key)
    asked = _asked(config, held_out, measured=measured)
    return SharedSampling(asked, kept=KeptSamples(path, key=key), queue=queue or OneProcess())


def help_sampling(
    config: TrainConfig, *, student: nn.Module | None, teacher: nn.Module | None, queue: StoreQueue
) -> None:
    """As another process than rank 0, when training is over: wait for the packed directory, and sample with the others.

    Args:
        config: The run's.
        student: Trained; afterwards it may hold the run's start. None: rank 0 alone has it, and its start.
        teacher: Full-precision model; None: it is loaded where this process samples with it.
        queue: What the processes share out by.
    """
    held_out, path = open_held_out(config), config.run_dir
    key = queue.wait_to_begin()
    sampling = SharedSampling(
        _asked(config, held_out, measured=MEASURED),
        kept=KeptSamples(path, key=key),
        queue=queue,
        watched=partial(interruptible, together=False),
        is_helper=True,
    )

    @cache
    def whole_teacher() -> nn.Module:
        if teacher is not None:
            return teacher
        loaded = config.model.load_teacher()
        return loaded if student is not None else loaded.to(sampling_device())  # the host has room for shares

    @cache
    def packed() -> nn.Module:
        loaded = load_packed(path / "packed", kernel=config.kernel)
        return loaded if student is not None else loaded.to(sampling_device())

    sampling.sample(COMPARED_STAGE, open_compared(teacher=whole_teacher, fake=student, packed=packed))
    if student is not None and start_absent(config, path) is None:
        sampling.sample(START_STAGE, {START: partial(at_start, config, student, path)})
    heartbeat.report(heartbeat.LEFT)


def start_absent(config: TrainConfig, path: Path) -> str | None:
    """Why a run has no videos of its PTQ start; None: it has."""
    if not config.steps:
        return "nothing was trained: the model is the PTQ start itself"
    if not config.evaluation.start_videos:
        return "evaluation.start_videos=false"
    if not (path / START_FILE).is_file():
        return f"{START_FILE} is no longer in the run's folder"
    return None


@contextmanager
def at_start(config: TrainConfig, student: nn.Module, path: Path) -> Iterator[nn.Module]:
    """Bring the student back to where training began, for good, and sample with it in the block.

    Raises:
        ModelAbsentError: The start can't be read.
    """
    try:
        config.method.prepare_(student)  # what it adds belongs to the start
        load_start(student, path)
        config.method.finish_(student)
    except (ValueError, OSError) as error:
        raise ModelAbsentError(str(error)) from error
    with phi_suspended(student):
        yield student


def _asked(config: TrainConfig, held_out: MeasuredInputs, *, measured: Sequence[str]) -> Asked:
    items = held_out_items(held_out.split, config.evaluation.quality_videos)
    return Asked(
        family=config.model,
        encode=held_out.split.encode,
        shown=shown_videos(config.evaluation, config.model, seed=config.seed),
        items=items,
        seeds=[HELD_OUT_SEED + index for index in range(len(items))],
        inputs=held_out,
        measured=measured,
    )
