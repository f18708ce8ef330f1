"""Evaluate a quantized model's videos beside the full-precision model's: a table with intervals, a page, the paper's row."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from qvgen import stop_request, work_item
from qvgen.config.leaves import load_leaf
from qvgen.config.processes import launched_world
from qvgen.config.processes.device_choice import say_chosen
from qvgen.config.processes.launched_world import LaunchedWorld
from qvgen.config.schema.evaluate import EvaluateConfig
from qvgen.evaluation.environment import DISTRIBUTIONS, collect_versions
from qvgen.evaluation.metrics.base import Metric, ModelMetric
from qvgen.evaluation.metrics.clip_model import ClipMetric
from qvgen.evaluation.prompt_list import PromptList, read_prompt_list
from qvgen.evaluation.prompt_subset import choose_subset
from qvgen.evaluation.report.evaluation_page import evaluation_lines, render_evaluation
from qvgen.evaluation.report.evaluation_row import csv_rows, latex_row, markdown_row
from qvgen.evaluation.suite.summary import against, read_evaluation, summarize
from qvgen.evaluation.suite.value_file import ValueFiles
from qvgen.evaluation.vbench.dimension import Dimension, NetworkDimension
from qvgen.evaluation.vbench.total import summarized_scores
from qvgen.evaluation.vbench_program.dimension import ProgramDimension
from qvgen.evaluation.vbench_program.program import VBenchProgram
from qvgen.run_directory import atomic_write
from qvgen.training.run_label import was_logged
from qvgen.verbs._evaluated_models import Compared, read_compared
from qvgen.verbs._evaluation_share import EvaluationShare, asked_of, measured_by
from qvgen.verbs._shared_videos import groups_said, joined_videos, started_workers, use_own_gpu

log = logging.getLogger(__name__)

JSON_FILE, PAGE_FILE = "evaluation.json", "evaluation.html"


def run(config: EvaluateConfig) -> None:
    """Sample what is missing, measure what is not measured yet, write table, page and rows.

    A call that was stopped is continued by the same command; what it leaves is the same to the byte.
    """
    other = None if config.against is None else read_evaluation(config.against, key="against")
    prompts, program = _prompts(config), _program(config)
    compared = read_compared(config, prompts)
    metrics, skipped = _metrics(config, compared, program)
    key = _key(metrics, compared, prompts)
    _refuse_other(config, key)
    if config.dry_run:
        if (world := launched_world.current()) is not None and world.rank:
            return
        for line in _plan(config, compared, metrics, skipped):
            print(line)
        return
    say_chosen()
    stop_request.continue_with({})
    share = EvaluationShare(config=config, compared=compared, metrics=metrics, prompts=prompts, program=program)
    world = launched_world.current()
    _do_all(config, share, world)
    if world is not None and world.rank:
        return  # rank 0 says what came of it
    content = summarize(metrics, share.results(), skipped=skipped, about=_about(config, compared, key))
    if prompts is not None and any(isinstance(metric, Dimension) for metric in metrics.values()):
        content["vbench"] = summarized_scores(content["metrics"])
        if config.vbench.subset is not None:
            whole = len(prompts.prompts) + len(prompts.left_out)
            content["vbench"]["subset"] = {"prompts": len(prompts.prompts), "of": whole}
        if share.of_program is not None:
            content["vbench"]["program"] = {"versions": dict(share.program.facts), "scores": share.of_program.scores()}
    if other is not None:
        content["against"] = {"label": other["model"]["label"], "metrics": against(content, other)}
    _write(config, compared, content)
    _log(config, compared, content)


def run_worker(config: EvaluateConfig, *, rank: int, world_size: int, port: int) -> None:
    """Do another process's part."""
    assert world_size == config.devices, f"{world_size} processes for devices={config.devices}"
    use_own_gpu(rank)
    prompts, program = _prompts(config), _program(config)
    compared = read_compared(config, prompts)
    metrics, _ = _metrics(config, compared, program)
    share = EvaluationShare(config=config, compared=compared, metrics=metrics, prompts=prompts, program=program)
    _do_share(share, rank=rank, port=port)


def _prompts(config: EvaluateConfig) -> PromptList | None:
    """The list of prompts, or the part of it that was asked for; None: there is none."""
    if config.vbench.info is None:
        return None
    prompts = read_prompt_list(config.vbench.info)
    return prompts if config.vbench.subset is None else choose_subset(prompts, config.vbench.subset)


def _program(config: EvaluateConfig) -> VBenchProgram | None:
    """VBench's own program, which was asked what it is; None: nobody named one."""
    if config.vbench.python is None:
        return None
    program = VBenchProgram(config.vbench.python, cache=config.vbench.weights)
    log.info("VBench's program: %s", ", ".join(f"{name} {value}" for name, value in program.facts.items() if value))
    return program


def _do_all(config: EvaluateConfig, share: EvaluationShare, world: LaunchedWorld | None) -> None:
    """Sample and measure everything with this command's other processes, which do the same, or as one task of a launcher."""
    use_own_gpu(0 if world is None else world.local_rank)
    if world is not None or config.devices == 1:
        work_item.give_up_after(None if world is None else config.hang_minutes)
        share.do()
        return
    with started_workers("evaluate", config) as workers:
        _do_share(share, rank=0, port=workers.port)


def _do_share(share: EvaluationShare, *, rank: int, port: int) -> None:
    """Do one of several processes' share; those that sample no video together need not speak to each other."""
    if share.config.context_parallel == 1:
        share.do()
        return
    with joined_videos(share.config, rank=rank, port=port) as group:
        replace(share, group=group).do()


def _metrics(
    config: EvaluateConfig, compared: Compared, program: VBenchProgram | None
) -> tuple[dict[str, Metric], dict[str, str]]:
    """The metrics of the suite that can be measured, and why the others can't.

    Raises:
        ValueError: There is no such metric, an argument of a metric that is not measured, or none is left.
    """
    for name in config.metric:
        if name not in config.suite.metrics:
            raise ValueError(f"metric.{name} has no effect: suite.metrics names no {name}")
    every = {name: _load(config, name, program) for name in config.suite.metrics}
    for field in fields(config.vbench):
        name, given = field.name, getattr(config.vbench, field.name)
        if given is not None and not any(isinstance(metric, Dimension) for metric in every.values()):
            raise ValueError(f"vbench.{name}={given} has no effect: suite.metrics names no dimension of VBench")
    reasons = {name: _why_not(metric, config, compared) for name, metric in every.items()}
    found = {name: metric for name, metric in every.items() if reasons[name] is None}
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    for name, reason in skipped.items():
        log.info("skipped: %s: %s", name, reason)
    if not found:
        name, reason = next(iter(skipped.items()))
        raise ValueError(f"none of the {len(every)} metrics can be measured; {name}: {reason}")
    return found, skipped


def _load(config: EvaluateConfig, name: str, program: VBenchProgram | None) -> Metric:
    """A metric; a dimension whose weights nobody named looks for them where ``vbench.weights`` says."""
    metric: Metric = load_leaf("metric", name, **config.metric.get(name, {}))
    if program is not None and isinstance(metric, Dimension):
        if name in config.metric:
            raise ValueError(f"metric.{name} has no effect: vbench.python={config.vbench.python} measures it")
        return ProgramDimension(metric, program)
    if isinstance(metric, NetworkDimension) and metric.weights_folder is None and config.vbench.weights is not None:
        metric = load_leaf("metric", name, **config.metric.get(name, {}), weights=str(config.vbench.weights))
    return metric


def _why_not(metric: Metric, config: EvaluateConfig, compared: Compared) -> str | None:
    if metric.paired and compared.reference is None:
        return "it compares with a reference, and reference=null"
    if isinstance(metric, ModelMetric) and not compared.models_are_there:
        return "it looks at the models, and needs packed=DIR or run_dir=RUN with reference=teacher"
    if isinstance(metric, ClipMetric) and any(case.caption is None for case in compared.cases):
        return "it needs the captions of the videos: prompts=FILE"
    if isinstance(metric, Dimension) and config.vbench.info is None and metric.asks_for:
        return "it has to know what a prompt asks for: vbench.info=VBench_full_info.json"
    if isinstance(metric, Dimension) and config.vbench.info is not None and compared.cases[0].caption is None:
        return "the list of prompts names its videos by their captions: prompts=FILE"
    return metric.absent()


def _key(metrics: Mapping[str, Metric], compared: Compared, prompts: PromptList | None) -> str:
    """Checksum of all that decides evaluation.json."""
    files = ValueFiles(Path(), measured_by(metrics))
    sides = [side.clips for side in (compared.model, compared.reference) if side is not None]
    return files.key(
        *[
            [case.name, case.prompt, *(clips.key(case) for clips in sides), asked_of(case, compared, prompts)]
            for case in compared.cases
        ]
    )


def _refuse_other(config: EvaluateConfig, key: str) -> None:
    """Raise ValueError where the folder holds another evaluation."""
    path = config.out / JSON_FILE
    if config.overwrite or not path.exists():
        return
    try:
        its_key = read_evaluation(config.out, key="out")["key"]
    except (ValueError, KeyError):
        its_key = None
    if its_key != key:
        raise ValueError(f"{path} is of another evaluation; write out=ANOTHER, or overwrite=true to replace it")


def _plan(
    config: EvaluateConfig, compared: Compared, metrics: Mapping[str, Metric], skipped: Mapping[str, str]
) -> list[str]:
    prompts = len({case.prompt for case in compared.cases})
    lines = [f"{len(compared.cases)} videos of {prompts} prompts into {config.out}"]
    lines += groups_said(config.devices, config.context_parallel)
    for side in filter(None, (compared.model, compared.reference)):
        missing = len(side.missing(compared.cases))
        lines.append(f"{side.label}: {missing} of them are to be sampled" if side.load else f"{side.label}: files")
    lines.append(f"metrics: {', '.join(metrics)}")
    return [*lines, *(f"skipped: {name}: {reason}" for name, reason in skipped.items())]


def _about(config: EvaluateConfig, compared: Compared, key: str) -> dict[str, Any]:
    reference = compared.reference
    return {
        "key": key,
        "model": {"label": compared.model.label, **compared.model.facts},
        "reference": None if reference is None else {"label": reference.label, **reference.facts},
        "suite": config.names.suite,
        "settings": compared.settings,
        "versions": collect_versions(DISTRIBUTIONS),
    }


def _log(config: EvaluateConfig, compared: Compared, content: dict[str, Any]) -> None:
    """Log the evaluation where its training was logged."""
    folders = config.packed_folders
    training = folders[0].absolute().parent if config.wandb and folders is not None and len(folders) == 1 else None
    if training is None or not was_logged(training):
        return
    from qvgen.training.tracking.evaluation_run import log_evaluation  # imports lightning

    log_evaluation(config.out, content, training=training, frames=compared.frames, fps=compared.fps(compared.cases[0]))


def _write(config: EvaluateConfig, compared: Compared, content: dict[str, Any]) -> None:
    page = render_evaluation(content, frames=compared.frames, fps=compared.fps(compared.cases[0]))
    files = {
        "evaluation.md": markdown_row(content),
        "evaluation.tex": latex_row(content),
        "evaluation.csv": csv_rows(content),
        PAGE_FILE: page,
        JSON_FILE: json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    with stop_request.undivided():
        for name, text in files.items():
            atomic_write(config.out / name, text.encode())
    for line in evaluation_lines(content):
        print(line)
    print(f"evaluation: {config.out / PAGE_FILE}")
