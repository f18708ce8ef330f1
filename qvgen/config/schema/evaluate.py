"""The frozen dataclass of the verb evaluate; meanings and ranges have their one home here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from qvgen.config.prompts.prompt import Prompts
from qvgen.config.schema.sections import require, require_groups
from qvgen.config.schema.value_range import Range, check_ranges

TEACHER = "teacher"


@dataclass(frozen=True, kw_only=True)
class EvaluateNames:
    """The options that were chosen: the model, None where the packed directory names it, and the suite."""

    model: str | None
    suite: str


@dataclass(frozen=True, kw_only=True)
class VBenchConfig:
    """The files that VBench's dimensions need, and who measures them (docs/vbench.md).

    Attributes:
        info: VBench_full_info.json or a part of it: the prompts, and the dimensions each is measured in; None: every video
            is measured in the dimensions that need not know what a prompt asks for, and there is no total.
        weights: Folder of the published weights (`qvgen assets weights=vbench`); None: there are none, and the package that
            ``python`` names looks in its own cache and fetches what is not there.
        subset: Number of prompts that are chosen from ``info``, as many of each dimension; only their videos are sampled and
            measured. None: all prompts.
        python: Python of an environment with VBench's own package, which then measures all dimensions in place of qvgen;
            None: qvgen measures those that it has.
    """

    info: Path | None
    weights: Path | None
    subset: Annotated[int | None, Range("> 0")]
    python: Path | None

    def __post_init__(self) -> None:
        check_ranges(self)
        for name in ("subset", "python"):
            value = getattr(self, name)
            require(
                value is None or self.info is not None,
                f"vbench.{name}={value} needs the list of prompts: vbench.info=VBench_full_info.json",
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Everything that `qvgen evaluate` needs.

    Attributes:
        packed: A packed directory, or both of a model with two experts, [HIGH,LOW].
        run_dir: A run's folder, in place of its packed directory.
        videos: A folder of video files, in place of a model that makes them.
        reference: What they are measured beside: teacher, the full-precision model; a folder of video files; None: nothing,
            and metrics that compare are skipped.
        model: The model that text encoder and VAE come from, as model=NAME model.path=FOLDER; None: what the packed
            directory says.
        suite: The metrics.
        metric: Arguments of metrics in place of their files', as +metric.clipsim.folder=FOLDER.
        vbench: The files that VBench's dimensions need, and who measures them.
        prompts: The captions: a file (:mod:`qvgen.config.prompts`) or a list; None: the model's own, for videos=FOLDER none.
        seeds: Videos of each prompt that names no seeds of its own; None: 5, for videos=FOLDER as many as there are.
        num_steps: Sampling steps; None: the model's own.
        guidance_scale: Factor of classifier-free guidance, 1 for none; None: the model's own.
        against: Folder of another model's evaluation, on the same prompts and seeds: is the difference more than noise?
        out: Folder of evaluation.json, evaluation.html and the rows, and of what was sampled and measured so far.
        references: Folder in which the reference model's videos are kept for all evaluations.
        wandb: True logs the evaluation of a run that was logged at Weights & Biases there too, as a run of its own that uses
            the packed folder; of another run, and of files, nothing is logged.
        overwrite: True replaces another evaluation that is in ``out``; False refuses to.
        kernel: Backend that runs the packed model; ``auto`` picks the best one that is there, a name never falls back.
        devices: Processes on this machine that share out videos and measurements, one for each GPU. ``auto``: all visible
            GPUs, and 1 without one. A number, or a list of visible GPUs ([0,2]). Tasks of torchrun or SLURM are the processes
            themselves. Their number changes no byte of the results.
        context_parallel: Processes that sample one video together, each a part of its tokens; a divisor of ``devices``, whose
            groups share out the videos (docs/distributed.md). 1: each samples whole videos.
        hang_minutes: A command of several ``devices`` ends after so many minutes in which one of its processes reported
            nothing of its item and waited for no other one; null: it waits for days.
        dry_run: True says what would be done.
        debug: True shows the traceback of an error.
        names: The option that was chosen from each group.
        typed: The command line's overrides.
        plain: All of the above as a plain dict.
    """

    packed: tuple[Path, ...] | None
    run_dir: Path | None
    videos: Path | None
    reference: str | None
    model: dict[str, Any] | None
    suite: Any
    metric: dict[str, Any]
    vbench: VBenchConfig
    prompts: Prompts | None
    seeds: Annotated[int | None, Range("> 0")]
    num_steps: Annotated[int | None, Range("> 0")]
    guidance_scale: Annotated[float | None, Range(">= 0")]
    against: Path | None
    out: Path
    references: Path
    wandb: bool
    overwrite: bool
    kernel: str
    devices: Annotated[int, Range("> 0")]
    context_parallel: Annotated[int, Range("> 0")]
    hang_minutes: Annotated[float | None, Range("> 0")]
    dry_run: bool
    debug: bool
    names: EvaluateNames
    typed: tuple[str, ...]
    plain: dict[str, Any]

    def __post_init__(self) -> None:
        check_ranges(self)
        given = [name for name in ("packed", "run_dir", "videos") if getattr(self, name) is not None]
        require(
            len(given) == 1,
            f"give one of packed=DIR, run_dir=RUN and videos=FOLDER, not {' and '.join(given) or 'none'}",
        )
        require(self.packed is None or 1 <= len(self.packed) <= 2, "packed=[...] takes one directory or two")
        for name, value in self.metric.items():
            require(isinstance(value, dict), f"metric.{name}={value} is a section; write +metric.{name}.KEY=VALUE")
        require_groups(self.devices, self.context_parallel)
        samples_teacher = self.reference == TEACHER
        require(
            self.context_parallel == 1 or self.videos is None or samples_teacher,
            f"context_parallel={self.context_parallel} is of sampling, and nothing is sampled; leave it out",
        )
        require(
            self.videos is None or not samples_teacher or (self.names.model is not None and self.prompts is not None),
            "videos=FOLDER reference=teacher needs model=NAME and prompts=FILE, from which the reference is sampled; or "
            "write reference=FOLDER, or reference=null",
        )
        for name in ("num_steps", "guidance_scale"):
            require(
                self.videos is None or samples_teacher or getattr(self, name) is None,
                f"{name} is of sampling, and nothing is sampled; leave it out",
            )

    @property
    def packed_folders(self) -> tuple[Path, ...] | None:
        """The packed directory, or both; None: the videos are there."""
        return (self.run_dir / "packed",) if self.run_dir is not None else self.packed
