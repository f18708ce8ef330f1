"""Inputs to measure on where there are no clips: inputs that the full-precision model meets while it samples videos.

Every call of the transformer in ``calibration.steps`` steps for one prompt after the other is recorded, as the pipeline makes
it (conditional and unconditional), until there are enough; evenly spaced ones of them are kept. Another model is called with
the very same arguments. The prompts are the evaluation's; the noise is neither the calibration's nor the shown videos'.

The errors are those at the states that the full-precision model visits, and not at noisy clips of the real world, so they are
not to be compared with errors on held-out clips.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qvgen.config.prompts.line import Prompt
from qvgen.config.prompts.prompt import Prompts
from qvgen.data.clip_report import warn_of_cut_captions
from qvgen.data.source import Split
from qvgen.evaluation.held_out import HELD_OUT_SEED, MeasuredInputs
from qvgen.evaluation.placement import placed
from qvgen.evaluation.sampled_teacher import SampledTeacher
from qvgen.models.base import Encode, predicted_part

SEED_OFFSET = 20_000
"""Added to ``HELD_OUT_SEED``, it gives a seed of these inputs; a run of that seed has its videos' and calibration's below."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of one call of a transformer, tensors on the CPU."""


class EncodedCaptions:
    """Conditions of captions, each encoded once and kept; the text encoder is freed after every round.

    Args:
        family: The model family; its ``encode`` is called where a caption is not known yet.
    """

    def __init__(self, family: Any) -> None:
        self._family = family
        self._rows: dict[str, dict[str, Tensor]] = {}

    def __call__(self, captions: Sequence[str]) -> Mapping[str, Tensor]:
        """A row for each caption."""
        missing = [caption for caption in dict.fromkeys(captions) if caption not in self._rows]
        if missing:
            if hasattr(self._family, "tokens_left_out"):
                warn_of_cut_captions(missing, tokens_left_out=self._family.tokens_left_out)
            if torch.cuda.is_available() and hasattr(self._family, "to"):
                self._family.to(torch.device("cuda", torch.cuda.current_device()))
            for caption in missing:
                self._rows[caption] = {key: value.cpu() for key, value in self._family.encode([caption]).items()}
            if hasattr(self._family, "release"):
                self._family.release()
        names = self._rows[captions[0]]
        return {name: torch.cat([self._rows[caption][name] for caption in captions]) for name in names}


def captions_split(captions: Sequence[str], encode: Encode) -> Split:
    """A split that has captions and no clips, in the place of a data set's."""
    items: Any = [{"caption": caption} for caption in captions]
    return Split(samples=items, buckets=[""] * len(items), encode=encode)


class SampledInputs(MeasuredInputs):
    """Recorded inputs of the full-precision model.

    Args:
        teacher: The full-precision model.
        prompts: Captions of the videos that it samples, in turn.
        num_samples: Inputs; whole calls are kept, so there may be a few more.
        num_steps: Sampling steps of each video.

    Raises:
        ValueError: The model was not called while sampling (an expert of other noise levels than the few steps').
    """

    def __init__(self, teacher: SampledTeacher, *, prompts: Prompts, num_samples: int, num_steps: int) -> None:
        self.split = captions_split(prompts.captions, teacher.encode)
        self._dtype, self._family = teacher.transformer.dtype, teacher.family
        calls: list[Call] = []
        rows = videos = 0
        while rows < num_samples:
            calls += _record(teacher, prompts.lines[videos % len(prompts)], index=videos, num_steps=num_steps)
            videos += 1
            rows = sum(map(_num_rows, calls))
            if not calls:
                raise ValueError(
                    f"calibration.steps={num_steps}: model={teacher.model.name} was not called in any of them; use more"
                )
        count = min(len(calls), math.ceil(num_samples * len(calls) / rows))
        kept = torch.linspace(0, len(calls) - 1, count).round().long().tolist()
        self._calls = [calls[index] for index in kept]
        self.num_samples, self.num_batches = sum(map(_num_rows, self._calls)), len(self._calls)
        self.batch_size = max(map(_num_rows, self._calls))
        self.source = (
            f"no clips: inputs of the full-precision model in {videos} "
            f"sampled video{'s' if videos > 1 else ''} of {num_steps} steps"
        )

    @torch.no_grad()
    def predictions(self, model: nn.Module, batches: Iterable[int] | None = None) -> Iterator[Tensor]:
        """See the base class; a batch is one recorded call."""
        chosen = self._calls if batches is None else [self._calls[number] for number in batches]
        with placed(model) as device:
            for arguments, named in chosen:

                def to_model(value: Tensor, *, device: torch.device = device) -> Tensor:
                    return value.to(device, model.dtype if value.dtype == self._dtype else value.dtype)

                outputs = model(*mapped(arguments, to_model), **mapped(named, to_model))
                yield predicted_part(self._family, outputs[0]).float().cpu()


class NothingMeasured(MeasuredInputs):
    """Stands in the place of inputs where ``evaluation.samples`` is 0: it has no inputs and measures no error.

    Args:
        encode: Turns captions into conditions, for a calibration.
    """

    source = "nothing: evaluation.samples=0"
    num_samples = num_batches = batch_size = 0

    def __init__(self, *, encode: Encode) -> None:
        self.split = captions_split([], encode)

    def predictions(self, model: nn.Module, batches: Iterable[int] | None = None) -> Iterator[Tensor]:
        """The predictions for no inputs."""
        del model, batches
        return iter(())

    def relative_error(self, model: nn.Module, reference: Sequence[Tensor]) -> float:
        """NaN, which says that nothing was measured."""
        del model, reference
        return math.nan


@torch.no_grad()
def _record(teacher: SampledTeacher, prompt: Prompt, *, index: int, num_steps: int) -> list[Call]:
    """All calls of the transformer while a video is sampled."""
    calls: list[Call] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        del module
        calls.append((mapped(arguments, on_cpu), mapped(named, on_cpu)))

    handle = teacher.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with placed(teacher.transformer):
            teacher.family.generate(
                teacher.transformer,
                [prompt.caption],
                [HELD_OUT_SEED + SEED_OFFSET + index],
                num_steps=num_steps,
                guidance_scale=teacher.family.guidance_scale,
                negative_prompts=[prompt.negative],
                encode=teacher.encode,
            )
    finally:
        handle.remove()
    return calls


def on_cpu(value: Tensor) -> Tensor:
    """A copy on the CPU."""
    return value.detach().cpu().clone()


def mapped(value: Any, change: Any) -> Any:
    """A structure of tuples, lists and dicts with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(mapped(entry, change) for entry in value)
    if isinstance(value, dict):
        return {key: mapped(entry, change) for key, entry in value.items()}
    return value


def _num_rows(call: Call) -> int:
    """Samples of a call: the first tensor's, which is the noisy video."""
    arguments, named = call
    first = named["hidden_states"] if "hidden_states" in named else arguments[0]
    return int(first.shape[0])
