"""One process's part in an evaluation: it samples videos and measures models and videos until all are there.

    reference's videos -> model's videos -> predictions of both -> measurements of videos -> VBench's own program

Each is a file of its own, which is there whole or not at all and claimed while it is made, so that any number of processes
does the same and a stopped one loses what it was at. Every video is sampled alone, so who makes it changes no bit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qvgen import stop_request, work_item
from qvgen.config.schema.evaluate import EvaluateConfig
from qvgen.data.claims import Claims
from qvgen.errors import UserError
from qvgen.evaluation.compared_calls import compared_calls
from qvgen.evaluation.metrics.base import Metric, ModelMetric
from qvgen.evaluation.prompt_list import PromptList
from qvgen.evaluation.suite.case import Case, spread
from qvgen.evaluation.suite.clip_store import SampledClips
from qvgen.evaluation.suite.measuring import measure_case
from qvgen.evaluation.suite.shared_cases import SharedCases
from qvgen.evaluation.suite.summary import MeasuredCase
from qvgen.evaluation.suite.value_file import ValueFiles
from qvgen.evaluation.vbench_program.dimension import ProgramDimension
from qvgen.evaluation.vbench_program.program import VBenchProgram
from qvgen.training.distributed.video_group import VideoGroup
from qvgen.training.identity import code_facts
from qvgen.training.source_checksum import sources_of
from qvgen.verbs._evaluated_models import Compared, Side
from qvgen.verbs._program_share import ProgramShare
from qvgen.verbs._video_sampler import VideoSampler

log = logging.getLogger(__name__)

_MEASURED = ("values", "reference_values", "features", "reference_features")


def measured_by(metrics: Mapping[str, Metric]) -> list[Any]:
    """The parts that decide values: the code and its libraries, and each metric with its arguments and weights."""
    return [code_facts({}), [[name, metric.key(), sources_of(metric)] for name, metric in metrics.items()]]


def asked_of(case: Case, compared: Compared, prompts: PromptList | None) -> list[Any]:
    """The parts of a case besides its pixels that decide a value: caption, rate, and what the list of prompts says."""
    return [case.caption, compared.fps(case), None if prompts is None else prompts.content(case.caption)]


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationShare:
    """What is sampled and measured, and where it is kept.

    Attributes:
        config: The verb's.
        compared: Both sides.
        metrics: Those that can be measured, by name.
        prompts: The list that says which prompts a dimension of VBench looks at; None: there is none.
        program: VBench's own program, which measures its dimensions; None: nobody named one.
        group: The processes that sample a video together; None: each does so by itself.
    """

    config: EvaluateConfig
    compared: Compared
    metrics: Mapping[str, Metric]
    prompts: PromptList | None = None
    program: VBenchProgram | None = None
    group: VideoGroup | None = None

    def do(self) -> None:
        """Make what is missing and is not made by another process, until all is there."""
        for side in (self.compared.reference, self.compared.model):
            if side is not None:
                side.group = self.group
            if side is not None and isinstance(side.clips, SampledClips):
                self._sample(side, side.clips)
        measured = self.config.out / "measured"
        with Claims(measured, key="out") as claims:
            if self._of_models:
                self._measure_models(claims)
            if self._of_videos:
                self._measure_videos(claims)
            if self.of_program is not None:
                self.of_program.do(claims)

    def results(self) -> list[MeasuredCase]:
        """Every case with its values, in order, when all are there.

        Raises:
            UserError: What was measured is gone, or of another evaluation that was written over it meanwhile.
        """
        found = []
        models = {case: self._read(self._model_values, case) for case in self._model_cases} if self._of_models else {}
        for case in self.compared.cases:
            measured = dict(self._read(self._video_values, case)) if self._of_videos else {key: {} for key in _MEASURED}
            rows = [measured["values"], models.get(case, {})]
            if self.of_program is not None:
                rows.append(self.of_program.values(case, "model"))
                measured["reference_values"] = {
                    **measured["reference_values"], **self.of_program.values(case, "reference"),
                }  # fmt: skip
            measured["values"] = {name: row[name] for name in self.metrics for row in rows if name in row}
            found.append(MeasuredCase(case=case, **measured))
        return found

    def _sample(self, side: Side, clips: SampledClips) -> None:
        key = "out" if side is self.compared.model else "references"
        with Claims(clips.folder, key=key) as claims, ExitStack() as opened:
            shared = SharedCases(self.compared.cases, claims=claims, key=clips.key, is_there=clips.holds)
            count, where, is_ready = len(shared.cases), f"videos of {side.label}, which are in {clips.folder}", False
            if 0 < shared.num_there < count:
                log.info("%s: %d of %d videos are there", side.label, shared.num_there, count)
            stop_request.note(f"after {shared.num_there} of {count} {where}")
            for case in self._together(shared, shared.cases):
                if not is_ready:
                    opened.enter_context(side.sampler.in_place())
                    is_ready = True
                assert case.asked is not None, "it is sampled"
                work_item.begin(f"video {case.name} of {side.label}")
                frames = side.sampler.sample_one(case.asked)
                if not self._writes:
                    continue
                with stop_request.undivided():
                    clips.write(case, frames)
                    log.info("%s: video %d of %d", side.label, shared.num_there + 1, count)
                    stop_request.note(f"after {shared.num_there + 1} of {count} {where}")
        side.free()

    @property
    def _writes(self) -> bool:
        """Whether this process keeps what its group has made."""
        return self.group is None or self.group.is_first

    def _together(self, taken: Iterable[Case], among: Sequence[Case]) -> Iterable[Case]:
        """The cases that this process makes with those of its group, which its first one takes."""
        return taken if self.group is None else self.group.together(taken, among=among)

    @cached_property
    def _of_models(self) -> dict[str, ModelMetric]:
        """The metrics that look at the models."""
        return {name: metric for name, metric in self.metrics.items() if isinstance(metric, ModelMetric)}

    @cached_property
    def _of_videos(self) -> dict[str, Metric]:
        """The metrics that look at one video after the other."""
        return {
            name: metric
            for name, metric in self.metrics.items()
            if not isinstance(metric, ModelMetric | ProgramDimension)
        }

    @cached_property
    def of_program(self) -> ProgramShare | None:
        """The part that VBench's own program measures; None: it measures nothing."""
        chosen = {name: metric for name, metric in self.metrics.items() if isinstance(metric, ProgramDimension)}
        if not chosen:
            return None
        assert self.program is not None, "the dimensions are its own"
        assert self.prompts is not None, "vbench.python needs vbench.info"
        return ProgramShare(
            self.config.out / "measured", compared=self.compared, metrics=chosen, prompts=self.prompts, program=self.program,
            measured_by=measured_by(chosen),
        )  # fmt: skip

    @cached_property
    def _model_cases(self) -> list[Case]:
        return spread(self.compared.cases)[: max(metric.videos for metric in self._of_models.values())]

    @cached_property
    def _model_values(self) -> ValueFiles:
        return ValueFiles(self.config.out / "measured" / "models", measured_by(self._of_models))

    @cached_property
    def _video_values(self) -> ValueFiles:
        return ValueFiles(self.config.out / "measured" / "videos", measured_by(self._of_videos))

    def _key(self, files: ValueFiles, case: Case) -> str:
        """Of a case's values: what measures, both videos or what makes them, and what is asked of them."""
        reference = self.compared.reference
        asked = asked_of(case, self.compared, self.prompts)
        return files.key(self.compared.model.clips.key(case), reference and reference.clips.key(case), asked)

    def _read(self, files: ValueFiles, case: Case) -> dict[str, Any]:
        values = files.read(case.name, key=self._key(files, case))
        if values is None:
            raise UserError(
                f"{files.folder / case.name}.json is gone or of another evaluation since it was measured; let one command "
                "at a time write to out, or give each of its own"
            )
        return values

    def _missing(self, files: ValueFiles, cases: Sequence[Case], claims: Claims, *, what: str) -> Iterator[Case]:
        """The cases that this process measures; says and notes each that is done."""

        def key(case: Case) -> str:
            return self._key(files, case)

        def is_there(case: Case) -> bool:
            return files.read(case.name, key=key(case)) is not None

        shared = SharedCases(cases, claims=claims, key=key, is_there=is_there)
        for case in shared:
            work_item.begin(f"{what} of video {case.name}")
            yield case
            log.info("%s of %d of %d videos", what, shared.num_there + 1, len(cases))
            stop_request.note(f"after the {what} of {shared.num_there + 1} of {len(cases)} videos")

    def _measure_models(self, claims: Claims) -> None:
        files, chosen, cases = self._model_values, self._of_models, self._model_cases
        model, reference = self.compared.model, self.compared.reference
        assert reference is not None, "they compare"
        for case in self._together(self._missing(files, cases, claims, what="predictions"), cases):
            assert case.asked is not None, "it is sampled"
            work_item.begin(f"predictions of video {case.name}")
            teacher, asked = reference.sampler, case.asked
            with self._shared(teacher, model.sampler):
                calls = compared_calls(
                    teacher.transformer,
                    model.sampler.transformer,
                    lambda teacher=teacher, asked=asked: teacher.sample_one(asked),
                    family=teacher.family,
                )
            if not self._writes:
                continue
            number = cases.index(case)
            values = {name: metric.measure(calls) for name, metric in chosen.items() if number < metric.videos}
            found = {name: value for name, value in values.items() if value is not None}
            files.write(case.name, found, key=self._key(files, case))
        for side in (reference, model):
            side.free()

    def _shared(self, *samplers: VideoSampler) -> AbstractContextManager[None]:
        """What has calls of their models share a video's tokens out, where processes do."""
        if self.group is None:
            return nullcontext()
        return self.group.shared(list(dict.fromkeys(model for sampler in samplers for model in sampler.transformers)))

    def _measure_videos(self, claims: Claims) -> None:
        files, reference = self._video_values, self.compared.reference
        for case in self._missing(files, self.compared.cases, claims, what="measurement"):
            values = measure_case(
                self._of_videos,
                case,
                video=self.compared.model.clips.read(case),
                reference=reference and reference.clips.read(case),
                fps=self.compared.fps(case),
                prompts=self.prompts,
            )
            files.write(case.name, values, key=self._key(files, case))
