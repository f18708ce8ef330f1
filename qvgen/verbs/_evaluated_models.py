"""The sides of an evaluation: its cases, the videos of the judged model and of the reference, and who samples them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qvgen.config.prompts.prompt import Prompts
from qvgen.config.schema.evaluate import TEACHER, EvaluateConfig
from qvgen.config.schema.verbs import GenerateConfig, ModelName
from qvgen.deploy.manifest import WEIGHTS_FILE, read_manifest
from qvgen.evaluation.prompt_list import PromptList
from qvgen.evaluation.suite.case import Case, sampled_cases
from qvgen.evaluation.suite.clip_store import Clips, FolderClips, SampledClips
from qvgen.evaluation.suite.video_folder import (
    check_names,
    check_rate,
    check_same,
    folder_cases,
    of_subset,
    read_folder,
)
from qvgen.training.distributed.video_group import VideoGroup
from qvgen.verbs._packed_family import check_sampler, load_family
from qvgen.verbs._shared_videos import check_shared_videos
from qvgen.verbs._video_request import Request, read_request
from qvgen.verbs._video_sampler import VideoSampler, made_from

SEEDS = 5
"""Videos of each prompt where nobody says how many."""


@dataclass(kw_only=True, eq=False)
class Side:
    """The judged model or the reference.

    Attributes:
        label: In tables.
        facts: The model or folder that it is, for evaluation.json.
        clips: The videos.
        load: Loads the model that samples them; None where they are files.
        group: The processes that sample a video together; None: each does so by itself.
    """

    label: str
    facts: dict[str, Any]
    clips: Clips
    load: Callable[[], VideoSampler] | None = None
    group: VideoGroup | None = None
    _sampler: VideoSampler | None = field(default=None, repr=False)

    @property
    def sampler(self) -> VideoSampler:
        """The model, loaded when it is first asked for."""
        if self._sampler is None:
            assert self.load is not None, "its videos are sampled"
            self._sampler = self.load()
            self._sampler.group = self.group
        return self._sampler

    def missing(self, cases: Sequence[Case]) -> dict[Case, Any]:
        """The cases that are still to be sampled, with what is asked for."""
        if not isinstance(self.clips, SampledClips):
            return {}
        return {case: case.asked for case in cases if not self.clips.holds(case)}

    def free(self) -> None:
        """Forget the model."""
        self._sampler = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Compared:
    """Everything that is compared.

    Attributes:
        cases: The videos, in order.
        model: The judged side.
        reference: The other side; None: nothing.
        settings: How videos are sampled; empty where none are.
        family: The model family; None where nothing is sampled.
    """

    cases: tuple[Case, ...]
    model: Side
    reference: Side | None
    settings: dict[str, Any]
    family: Any = None

    def fps(self, case: Case) -> float:
        """Frames per second of a video: what the model family says, else the file."""
        if self.family is not None:
            return float(self.family.fps)
        assert isinstance(self.model.clips, FolderClips), "nothing was sampled"
        return float(self.model.clips.probe(case.name).fps)

    def frames(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The video of a case and the reference's, uint8 [F, H, W, 3], by the case's name."""
        (case,) = (case for case in self.cases if case.name == name)
        return self.model.clips.read(case), self.reference and self.reference.clips.read(case)

    @property
    def models_are_there(self) -> bool:
        """Whether both sides are models, whose answers to the same input can be compared."""
        return self.model.load is not None and self.reference is not None and self.reference.load is not None


def read_compared(config: EvaluateConfig, listed: PromptList | None = None) -> Compared:
    """Everything that a command compares; nothing is loaded yet.

    Args:
        config: The command.
        listed: VBench's list of prompts, or the part that is evaluated; None: there is none.

    Raises:
        ValueError: A folder, a model, prompts and videos that do not fit each other, by name.
    """
    packed, samples_teacher = config.packed_folders, config.reference == TEACHER
    family = request = None
    if packed is not None or samples_teacher:
        sampling = _sampling(config, packed)
        family = load_family(sampling)
        request = read_request(sampling, family)
        check_sampler(packed, family, num_steps=request.num_steps, guidance_scale=request.guidance_scale)
        check_shared_videos(sampling, family)
    negative = "" if family is None else family.negative_prompt
    if config.videos is not None:
        files = read_folder(config.videos, key="videos")
        if family is not None:
            check_rate(files, family.fps, key="videos")
        captions = () if listed is None else {*listed.prompts, *listed.left_out}
        cases = folder_cases(
            files, config.prompts, key="videos", seeds=config.seeds, negative=negative, captions=captions
        )
        if listed is not None and listed.left_out:
            cases = of_subset(cases, listed.prompts, key="videos")
            files = files.only(cases)
        model = Side(label=_label(config.videos), facts={"videos": str(config.videos)}, clips=files)
    else:
        assert packed is not None, "one of the three is given"
        assert request is not None, "a family was loaded"
        is_part = listed is not None and listed.left_out
        prompts = config.prompts or Prompts.of(listed.prompts if is_part else family.prompts)
        cases = sampled_cases(prompts, seeds=config.seeds or SEEDS, negative=negative)
        if is_part:
            cases = of_subset(cases, listed.prompts, key="prompts")
        model = _packed_side(config, packed, family, _with_cases(request, cases))
    reference = None
    if samples_teacher:
        assert request is not None, "a family was loaded"
        reference = _teacher_side(config, packed, family, _with_cases(request, cases))
    elif config.reference is not None:
        reference = _folder_side(config, model, cases)
        if family is not None:
            assert isinstance(reference.clips, FolderClips), "it is a folder"
            check_rate(reference.clips, family.fps, key="reference")
    settings = {} if request is None else {"num_steps": request.num_steps, "guidance_scale": request.guidance_scale}
    return Compared(cases=tuple(cases), model=model, reference=reference, settings=settings, family=family)


def _sampling(config: EvaluateConfig, packed: tuple[Path, ...] | None) -> GenerateConfig:
    """The part of a configuration that says how videos are sampled, as `qvgen generate` has it."""
    return GenerateConfig(
        packed=packed,
        model=config.model,
        prompt=None,
        prompts=config.prompts,
        negative_prompt=None,
        image=None,
        seed=(0,),
        num_steps=config.num_steps,
        guidance_scale=config.guidance_scale,
        delta=None,
        out=config.out,
        overwrite=False,
        kernel=config.kernel if packed else "auto",
        fused_norms=False,
        devices=config.devices,
        context_parallel=config.context_parallel,
        hang_minutes=config.hang_minutes,
        dry_run=False,
        debug=False,
        names=ModelName(model=config.names.model),
        typed=config.typed,
        plain=config.plain,
    )


def _with_cases(request: Request, cases: Sequence[Case]) -> Request:
    return replace(request, videos=tuple(case.asked for case in cases if case.asked is not None))


def _packed_side(config: EvaluateConfig, packed: tuple[Path, ...], family: Any, request: Request) -> Side:
    sampling = _sampling(config, packed)
    manifests = [read_manifest(path) for path in packed]
    return Side(
        label=_label(config.run_dir or packed[0]),
        facts={
            "packed": [str(path) for path in packed],
            "sha256": [manifest.sha256 for manifest in manifests],
            "bytes": sum((path / WEIGHTS_FILE).stat().st_size for path in packed),
        },
        clips=SampledClips(config.out / "videos", made_from(sampling, family, request)),
        load=lambda: VideoSampler(sampling, family, request),
    )


def _teacher_side(config: EvaluateConfig, packed: tuple[Path, ...] | None, family: Any, request: Request) -> Side:
    """The full-precision model; whatever quantized model it is compared with, its videos have the same keys."""
    arguments = dict(config.model or {}) if packed is None else dict(read_manifest(packed[0]).base_arguments)
    sampling = replace(
        _sampling(config, packed), packed=None, kernel="auto", model=arguments, names=ModelName(model=family.name)
    )
    return Side(
        label="full precision",
        facts={"model": family.name, "revision": family.revision},
        clips=SampledClips(config.references / family.name, made_from(sampling, family, request)),
        load=lambda: VideoSampler(sampling, family, request),
    )


def _folder_side(config: EvaluateConfig, model: Side, cases: Sequence[Case]) -> Side:
    folder = Path(str(config.reference))
    files = read_folder(folder, key="reference")
    if config.vbench.subset is not None:
        files = files.only(cases)
    if isinstance(model.clips, FolderClips):
        check_same(model.clips, files)
    else:
        check_names([case.name for case in cases], files, key="reference")
    return Side(label=_label(folder), facts={"videos": str(folder)}, clips=files)


def _label(path: Path) -> str:
    """A short name: the folder's, or of a run's packed directory the run's."""
    path = path.absolute()
    return path.parent.name if path.name in ("packed", "videos") else path.name
