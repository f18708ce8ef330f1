"""Evaluate a quantized model's videos beside the full-precision model's: a table with intervals, a page, the paper's row."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qvgen import stop_request
from qvgen.config.evaluate_schema import EvaluateConfig
from qvgen.config.leaves import load_leaf
from qvgen.evaluation.compared_calls import compared_calls
from qvgen.evaluation.environment import DISTRIBUTIONS, collect_versions
from qvgen.evaluation.metrics.base import Metric, ModelMetric
from qvgen.evaluation.metrics.clip_model import ClipMetric
from qvgen.evaluation.prompt_list import PromptList, read_prompt_list
from qvgen.evaluation.report.evaluation_page import evaluation_lines, render_evaluation
from qvgen.evaluation.report.evaluation_row import csv_rows, latex_row, markdown_row
from qvgen.evaluation.suite.case import Case, spread
from qvgen.evaluation.suite.clip_store import FolderClips, SampledClips
from qvgen.evaluation.suite.measuring import measure_case
from qvgen.evaluation.suite.summary import MeasuredCase, against, read_evaluation, summarize
from qvgen.evaluation.suite.value_file import ValueFiles
from qvgen.evaluation.vbench.dimension import Dimension, NetworkDimension
from qvgen.evaluation.vbench.total import summarized_scores
from qvgen.run_directory import atomic_write
from qvgen.training.identity import code_facts
from qvgen.training.source_checksum import sources_of
from qvgen.verbs._evaluated_models import Compared, Side, read_compared

log = logging.getLogger(__name__)

JSON_FILE, PAGE_FILE = "evaluation.json", "evaluation.html"


def run(config: EvaluateConfig) -> None:
    """Sample what is missing, measure what is not measured yet, write table, page and rows.

    A call that was stopped is continued by the same command; what it leaves is the same to the byte.
    """
    other = None if config.against is None else read_evaluation(config.against, key="against")
    prompts = None if config.vbench.info is None else read_prompt_list(config.vbench.info)
    compared = read_compared(config, captions=() if prompts is None else prompts.prompts)
    metrics, skipped = _metrics(config, compared)
    key = _key(metrics, compared, prompts)
    _refuse_other(config, key)
    if config.dry_run:
        for line in _plan(config, compared, metrics, skipped):
            print(line)
        return
    stop_request.continue_with({})
    for side in (compared.reference, compared.model):
        if side is not None:
            _sample(side, compared)
    of_models = _measure_models(config, metrics, compared)
    measured = _measure_videos(config, metrics, compared, of_models, prompts)
    content = summarize(metrics, measured, skipped=skipped, about=_about(config, compared, key))
    if prompts is not None and any(isinstance(metric, Dimension) for metric in metrics.values()):
        content["vbench"] = summarized_scores(content["metrics"])
    if other is not None:
        content["against"] = {"label": other["model"]["label"], "metrics": against(content, other)}
    _write(config, compared, content)


def _metrics(config: EvaluateConfig, compared: Compared) -> tuple[dict[str, Metric], dict[str, str]]:
    """The metrics of the suite that can be measured, and why the others can't.

    Raises:
        ValueError: There is no such metric, an argument of a metric that is not measured, or none is left.
    """
    for name in config.metric:
        if name not in config.suite.metrics:
            raise ValueError(f"metric.{name} has no effect: suite.metrics names no {name}")
    every = {name: _load(config, name) for name in config.suite.metrics}
    for name in ("info", "weights"):
        given = getattr(config.vbench, name)
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


def _load(config: EvaluateConfig, name: str) -> Metric:
    """A metric; a dimension whose weights nobody named looks for them where ``vbench.weights`` says."""
    metric: Metric = load_leaf("metric", name, **config.metric.get(name, {}))
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
    files = ValueFiles(Path(), _measured_by(metrics))
    sides = [side.clips for side in (compared.model, compared.reference) if side is not None]
    return files.key(
        *[
            [case.name, case.prompt, *(clips.key(case) for clips in sides), _asked(case, compared, prompts)]
            for case in compared.cases
        ]
    )


def _asked(case: Case, compared: Compared, prompts: PromptList | None) -> list[Any]:
    """The parts of a case besides its pixels that decide a value: caption, rate, and what the list of prompts says."""
    return [case.caption, _fps(compared, case), None if prompts is None else prompts.content(case.caption)]


def _measured_by(metrics: Mapping[str, Metric]) -> list[Any]:
    """The parts that decide values: the code and its libraries, and each metric with its arguments and weights."""
    return [code_facts({}), [[name, metric.key(), sources_of(metric)] for name, metric in metrics.items()]]


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
    for side in filter(None, (compared.model, compared.reference)):
        missing = len(side.missing(compared.cases))
        lines.append(f"{side.label}: {missing} of them are to be sampled" if side.load else f"{side.label}: files")
    lines.append(f"metrics: {', '.join(metrics)}")
    return [*lines, *(f"skipped: {name}: {reason}" for name, reason in skipped.items())]


def _sample(side: Side, compared: Compared) -> None:
    """Sample the videos that are missing."""
    missing, count = side.missing(compared.cases), len(compared.cases)
    if not missing:
        return
    clips = side.clips
    assert isinstance(clips, SampledClips), "files are not sampled"
    made = count - len(missing)
    if made:
        log.info("%s: %d of %d videos are there", side.label, made, count)
    stop_request.note(f"after {made} of {count} videos of {side.label}, which are in {clips.folder}")
    for done, (case, _, video) in enumerate(side.sampler.sample(missing), start=made + 1):
        with stop_request.undivided():
            clips.write(case, torch.from_numpy(video))
            log.info("%s: video %d of %d", side.label, done, count)
            stop_request.note(f"after {done} of {count} videos of {side.label}, which are in {clips.folder}")
    side.free()


def _measure_models(
    config: EvaluateConfig, metrics: Mapping[str, Metric], compared: Compared
) -> dict[Case, dict[str, float]]:
    """The values of the metrics that look at the models, by case."""
    chosen = {name: metric for name, metric in metrics.items() if isinstance(metric, ModelMetric)}
    found: dict[Case, dict[str, float]] = {}
    if not chosen:
        return found
    assert compared.reference is not None, "they compare"
    files = ValueFiles(config.out / "measured" / "models", _measured_by(chosen))
    cases = spread(compared.cases)[: max(metric.videos for metric in chosen.values())]
    for number, case in enumerate(cases):
        key = files.key(compared.model.clips.key(case), compared.reference.clips.key(case))
        values = files.read(case.name, key=key)
        if values is None:
            teacher, model, asked = compared.reference.sampler, compared.model.sampler, case.asked
            assert asked is not None, "it is sampled"
            calls = compared_calls(
                teacher.transformer, model.transformer, lambda teacher=teacher, asked=asked: teacher.sample_one(asked)
            )
            values = {name: metric.measure(calls) for name, metric in chosen.items() if number < metric.videos}
            values = {name: value for name, value in values.items() if value is not None}
            files.write(case.name, values, key=key)
            log.info("predictions of video %d of %d", number + 1, len(cases))
            stop_request.note(f"after the predictions of {number + 1} of {len(cases)} videos were measured")
        found[case] = values
    for side in (compared.reference, compared.model):
        side.free()
    return found


def _measure_videos(
    config: EvaluateConfig,
    metrics: Mapping[str, Metric],
    compared: Compared,
    of_models: Mapping[Case, Mapping[str, float]],
    prompts: PromptList | None,
) -> list[MeasuredCase]:
    """Every case with its values, in order."""
    own = {name: metric for name, metric in metrics.items() if not isinstance(metric, ModelMetric)}
    files = ValueFiles(config.out / "measured" / "videos", _measured_by(own))
    reference, found = compared.reference, []
    for done, case in enumerate(compared.cases, 1):
        key = files.key(
            compared.model.clips.key(case), reference and reference.clips.key(case), _asked(case, compared, prompts)
        )
        values = files.read(case.name, key=key)
        if values is None:
            values = measure_case(
                own,
                case,
                video=compared.model.clips.read(case),
                reference=reference and reference.clips.read(case),
                fps=_fps(compared, case),
                prompts=prompts,
            )
            files.write(case.name, values, key=key)
            log.info("measured %d of %d videos", done, len(compared.cases))
        stop_request.note(f"after {done} of {len(compared.cases)} videos were measured")
        values["values"] = {
            name: value for name in metrics for value in _of(name, values["values"], of_models.get(case))
        }
        found.append(MeasuredCase(case=case, **values))
    return found


def _of(name: str, *rows: Mapping[str, float] | None) -> list[float]:
    return [row[name] for row in rows if row is not None and name in row]


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


def _fps(compared: Compared, case: Case) -> float:
    """Frames per second of a video: what the model family says, else the file."""
    if compared.family is not None:
        return float(compared.family.fps)
    clips = compared.model.clips
    assert isinstance(clips, FolderClips), "nothing was sampled"
    return float(clips.probe(case.name).fps)


def _write(config: EvaluateConfig, compared: Compared, content: dict[str, Any]) -> None:
    def frames(name: str) -> tuple[Tensor, Tensor | None]:
        (case,) = (case for case in compared.cases if case.name == name)
        reference = compared.reference
        return compared.model.clips.read(case), reference and reference.clips.read(case)

    fps = _fps(compared, compared.cases[0])
    page = render_evaluation(content, frames=frames, fps=fps)
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
