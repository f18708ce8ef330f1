"""The videos of all models of a run, by all of its processes: each batch once, on whichever of them is free.

    rank 0   teacher shown   fake-quantized shown    packed shown     ...
    rank 1   teacher table           fake-quantized table             ...      each batch into a file of its own

So are the outputs of a run's own models for its held-out inputs, batch by batch, behind a model's videos.

A batch is what is computed together, and depends on the configuration alone: the files are the same bytes for any number of
processes. Models are sampled in stages, because the start's videos take the student back to where training began.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qvgen.config.prompts.image_prompt import caption_of
from qvgen.config.prompts.prompt import PromptedVideo
from qvgen.deploy.delta_switch import find_switch
from qvgen.deploy.packed_fusion import kernel_names
from qvgen.evaluation.held_out import MeasuredInputs
from qvgen.evaluation.item_queue import ItemQueue
from qvgen.evaluation.kept_samples import OUTPUTS, BatchFacts, KeptSamples, SampledBatch
from qvgen.evaluation.placement import placed
from qvgen.evaluation.quality_data import SamplingCost
from qvgen.evaluation.sampling import batch_size, generate_videos, joined
from qvgen.evaluation.sampling_cost import measured, weight_bytes, weights_dtype
from qvgen.models.base import Encode, VideoDiT
from qvgen.models.sampled_video import UnusableVideoError

log = logging.getLogger(__name__)

SHOWN, TABLE = "shown", "table"

OpenModel = Callable[[], AbstractContextManager[nn.Module]]
"""Gives a model while its videos are sampled."""

Watched = Callable[[nn.Module], AbstractContextManager[None]]
"""Wraps the sampling with a model: says that this process lives, looks whether it shall stop."""


class ModelAbsentError(Exception):
    """A model whose videos were to be sampled can't be had; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The videos that are shown, and the table's, whose items are of the data, with their seeds.

    Attributes:
        inputs: Held-out inputs, for which outputs are asked, too; None: none are.
        measured: Models whose outputs are asked.
    """

    family: VideoDiT
    encode: Encode
    shown: Sequence[PromptedVideo]
    items: Sequence[Mapping[str, Any]]
    seeds: Sequence[int]
    inputs: MeasuredInputs | None = None
    measured: Sequence[str] = ()

    def parts_of(self, model: str) -> list[tuple[str, int, int]]:
        """A model's parts in the order in which one process computes them, each with its items and how many at once."""
        size = batch_size(self.family)
        parts = [(SHOWN, len(self.shown), size), (TABLE, len(self.items), size)]  # the shown ones warm a model up
        if self.inputs is not None and model in self.measured:  # after a resume they may be cut otherwise
            parts.append((f"{OUTPUTS}{self.inputs.batch_size}", self.inputs.num_batches, 1))
        return parts

    @property
    def captions(self) -> list[str]:
        """Captions of the table's videos."""
        return [caption_of(item) for item in self.items]


@dataclass(frozen=True)
class Batch:
    """Videos ``start`` .. ``stop - 1`` of one model's, shown or the table's; of outputs, those for so many batches of inputs.

    Example:
        >>> Batch("teacher", TABLE, 32, 40).name
        'teacher-table-0032'
    """

    model: str
    part: str
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.model}-{self.part}-{self.start:04d}"

    @property
    def words(self) -> str:
        """The batch in words."""
        return f"{self.model}, {self.part.rstrip('0123456789')} {self.start} to {self.stop - 1}"


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """One model's videos, uint8 [B, F, H, W, 3], what the table's took, and its outputs.

    Attributes:
        shown: The shown ones.
        table: The table's.
        cost: Time and memory.
        activation_bits: Mean width that a policy chose; None without one.
        is_warm: Whether the time is without a process's first use of the model.
        outputs: Float32, for each batch of held-out inputs; none where none were asked.
    """

    shown: Tensor
    table: Tensor
    cost: SamplingCost
    activation_bits: float | None
    is_warm: bool
    outputs: tuple[Tensor, ...]


def batches(models: Sequence[str], asked: Asked) -> list[Batch]:
    """All batches of some models, in the order in which one process computes them."""
    return [
        Batch(model, part, start, min(start + size, count))
        for model in models
        for part, count, size in asked.parts_of(model)
        for start in range(0, count, size)
    ]


class SharedSampling:
    """One process's part in the sampling of a run.

    Args:
        asked: The videos.
        kept: Where they are kept.
        queue: Which process samples which batch.
        watched: Wraps the sampling with a model.
        is_helper: This is another process than rank 0: what it can't do it leaves to rank 0, which says why.
    """

    def __init__(
        self,
        asked: Asked,
        *,
        kept: KeptSamples,
        queue: ItemQueue,
        watched: Watched = lambda _: nullcontext(),
        is_helper: bool = False,
    ) -> None:
        self.asked, self.kept, self.queue = asked, kept, queue
        self._watched, self._is_helper = watched, is_helper

    def sample(self, stage: str, models: Mapping[str, OpenModel]) -> None:
        """Sample batches until all of a stage are taken, by this process or another.

        Raises:
            ModelAbsentError: A model can't be had.
            ValueError: A video that is not finite or of one colour.
        """
        todo = batches(list(models), self.asked)
        with ExitStack() as opened:
            at: str | None = None
            while (number := self.queue.take(stage)) < len(todo):
                batch = todo[number]
                if self.kept.read(batch.name) is not None:
                    what = "" if batch.part.startswith(OUTPUTS) else "videos of "
                    log.info("%s%s: kept from before the run was stopped", what, batch.words)
                    continue
                try:
                    is_warm = batch.model == at
                    if not is_warm:
                        opened.close()
                        at = None
                        model, at = self._open(models[batch.model], opened), batch.model
                    self.kept.write(batch.name, self._sampled(batch, model, is_warm=is_warm))
                    log.log(logging.INFO if self._is_helper else logging.DEBUG, "sampled %s", batch.words)
                except (ModelAbsentError, UnusableVideoError) as error:
                    if not self._is_helper:
                        raise
                    log.warning("%s; left to rank 0", error)
                    self.queue.give_back(stage, number)

    def gather(self, stage: str, models: Mapping[str, OpenModel]) -> dict[str, Sampled]:
        """As rank 0, with nothing left to take: wait for all batches of a stage; the models' videos.

        Raises:
            ModelAbsentError: A model can't be had, here and in another process.
            ValueError: A video that is not finite or of one colour.
        """
        todo = batches(list(models), self.asked)
        found = {batch: self._result(stage, number, batch, models) for number, batch in enumerate(todo)}
        self.queue.done_waiting()
        return {name: _joined(name, {b: s for b, s in found.items() if b.model == name}) for name in models}

    def _result(self, stage: str, number: int, batch: Batch, models: Mapping[str, OpenModel]) -> SampledBatch:
        while True:
            is_mine = self.queue.is_given_back(stage, number) or self.kept.has_file(batch.name)
            if (sampled := self.kept.read(batch.name)) is not None:
                return sampled
            if is_mine:  # nobody else does it any more, or it was damaged since
                with ExitStack() as opened:
                    model = self._open(models[batch.model], opened)
                    self.kept.write(batch.name, self._sampled(batch, model, is_warm=False))
            else:
                self.queue.wait()

    def _open(self, open_model: OpenModel, opened: ExitStack) -> nn.Module:
        model = opened.enter_context(open_model())
        opened.enter_context(placed(model))
        opened.enter_context(self._watched(model))
        return model

    def _sampled(self, batch: Batch, model: nn.Module, *, is_warm: bool) -> SampledBatch:
        switch = find_switch(model)
        if switch is not None:
            switch.history.clear()
        device = next(model.parameters()).device
        with measured(device) as spent:
            frames = self._computed(batch, model)
        widths = [] if switch is None else switch.history
        facts = BatchFacts(
            dtype=weights_dtype(model),
            kernels=kernel_names(model),
            seconds=spent.seconds,
            weight_bytes=weight_bytes(model),
            working_bytes=spent.working_bytes,
            is_warm=is_warm,
            widths_sum=sum(widths),
            widths_count=len(widths),
        )
        return SampledBatch(frames=frames, facts=facts)

    def _computed(self, batch: Batch, model: nn.Module) -> Tensor:
        asked, part = self.asked, slice(batch.start, batch.stop)
        if batch.part.startswith(OUTPUTS):
            assert asked.inputs is not None, "they were asked for"
            return next(asked.inputs.predictions(model, [batch.start]))
        shown = asked.shown[part]
        captions, seeds, negatives = asked.captions[part], asked.seeds[part], None
        if batch.part == SHOWN:
            captions, seeds = [video.caption for video in shown], [video.seed for video in shown]
            negatives = [video.negative for video in shown]
        return generate_videos(asked.family, model, captions, seeds, negative_prompts=negatives, encode=asked.encode)


def _joined(model: str, found: Mapping[Batch, SampledBatch]) -> Sampled:
    """The batches of a model as one; its time is that of batches before which the process had sampled with it, if any."""
    shown, table = ({b: s for b, s in found.items() if b.part == part} for part in (SHOWN, TABLE))
    warm = {batch: sampled for batch, sampled in table.items() if sampled.facts.is_warm}
    timed, facts = warm or table, [sampled.facts for sampled in table.values()]
    working = [fact.working_bytes for fact in facts if fact.working_bytes is not None]
    chosen = sum(fact.widths_count for fact in facts)
    return Sampled(
        shown=joined([sampled.frames for sampled in shown.values()]),
        table=joined([sampled.frames for sampled in table.values()]),
        cost=SamplingCost(
            name=model,
            dtype=facts[0].dtype,
            kernels=tuple(sorted({kernel for fact in facts for kernel in fact.kernels})),
            seconds_per_video=sum(sampled.facts.seconds for sampled in timed.values())
            / sum(batch.stop - batch.start for batch in timed),
            weight_bytes=max(fact.weight_bytes for fact in facts),
            working_bytes=max(working) if len(working) == len(facts) else None,
        ),
        activation_bits=sum(fact.widths_sum for fact in facts) / chosen if chosen else None,
        is_warm=bool(warm),
        outputs=tuple(sampled.frames for batch, sampled in found.items() if batch.part.startswith(OUTPUTS)),
    )
