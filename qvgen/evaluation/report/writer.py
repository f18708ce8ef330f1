"""The report of a run: report.html, one file that needs nothing else, and report.json for other programs.

Videos are mp4 inside the page, curves are SVG, style and script are inline (:mod:`qvgen.evaluation.report.page`).

Left out: measuring. The numbers come in as ReportData; only the PSNR under each video is computed here, from
the very frames that are shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from qvgen.evaluation.distance import psnr_db
from qvgen.evaluation.layer_history import LAYER_FILE, LayerHistory, layer_histories, read_layer_rows
from qvgen.evaluation.mixed_precision_files import Allocation, read_allocation
from qvgen.evaluation.report.canvas import Series
from qvgen.evaluation.report.charts import draw_charts, read_history
from qvgen.evaluation.report.embedded_video import ShownVideo, shown_video
from qvgen.evaluation.report.first_screen import build_first_screen
from qvgen.evaluation.report.heat_map import draw_layers
from qvgen.evaluation.report.json_content import to_json_dict
from qvgen.evaluation.report.mixed_precision_section import build_bit_section, section_json
from qvgen.evaluation.report.page import render_page
from qvgen.evaluation.report.validation_section import build_section
from qvgen.evaluation.report.verdict import judge_all
from qvgen.evaluation.report_data import ReportData, ValidationVideo, VideoComparison
from qvgen.evaluation.validation_files import DIRECTORY, read_validation
from qvgen.layers.layer_threads import idle_threads, in_threads
from qvgen.run_directory import atomic_write
from qvgen.run_identity import Change, read_changes

TRAJECTORY_PSNR_FLOOR_DB = 50.0
"""Packed and fake-quantized videos agree from this PSNR on; there the RMS difference is 0.8 levels of 255."""

WIDE_PIXELS = 256
"""Videos of more rows stand alone in a row of the page."""


def write_report(run_dir: Path, data: ReportData) -> Path:
    """Write run_dir/report.json and run_dir/report.html; each is there whole or as it was.

    The curves are read from run_dir/metrics.csv; without that file the page says so. Pictures of all layers are drawn from
    run_dir/layer_metrics.csv, where there is one. What was sampled while training is
    read from run_dir/validation; without that folder there is no such section. Bits that were allocated to layers are read
    from run_dir/mixed_precision, likewise; and what changed in the run while it was stopped, from run_dir/identity.json.

    Args:
        run_dir: the run's folder; it exists.
        data: everything that is shown.

    Returns:
        The path of report.html.

    Raises:
        ValueError: metrics.csv is damaged, or a video's frames are no uint8 [F, H, W, 3] of one shape.
        OSError: a file cannot be written.
    """
    run_dir = Path(run_dir)
    validation = read_validation(run_dir / DIRECTORY, verify=True)
    allocation = read_allocation(run_dir)
    changes = read_changes(run_dir)
    history = read_history(run_dir / "metrics.csv")
    layers = layer_histories(read_layer_rows(run_dir / LAYER_FILE)[0])
    page = render_html(data, history, validation, allocation, changes, layers=layers)
    content = {
        **to_json_dict(data, validation),
        "mixed_precision": section_json(allocation),
        "changes": [asdict(change) for change in changes],
    }
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    atomic_write(run_dir / "report.json", text.encode())
    path = run_dir / "report.html"
    atomic_write(path, page.encode())
    return path


def render_html(
    data: ReportData,
    history: Mapping[str, Series],
    validation: Sequence[ValidationVideo] = (),
    allocation: Allocation | None = None,
    changes: Sequence[Change] = (),
    *,
    layers: Mapping[str, LayerHistory] = MappingProxyType({}),
) -> str:
    """Return the page as text.

    Args:
        data: everything that is shown.
        history: curves by name, as :func:`qvgen.evaluation.report.charts.read_history` returns them.
        validation: what was sampled while training, in order of step and prompt; its videos are read.
        allocation: which bits every layer got, and of what; None where all have the same.
        changes: facts that were others when the run went on, as it was told to; the page says so on top.
        layers: numbers of all layers over the steps, by name.
    """
    error = data.relative_error
    agrees = data.checks.trajectory_psnr_db >= TRAJECTORY_PSNR_FLOOR_DB
    return render_page(
        "report.html.j2",
        data=data,
        first=build_first_screen(data, trajectory_agrees=agrees),
        verdicts=judge_all(data.quality),
        charts=[*draw_charts(history, ptq_error=error.ptq), *draw_layers(layers).values()],
        validation=build_section(validation, last_step=data.run.steps),
        mixed=build_bit_section(allocation),
        changes=changes,
        comparisons=list(zip(data.videos, _encoded(data.videos), strict=True)),
        wide=any(video.teacher.shape[1] > WIDE_PIXELS for video in data.videos),
        error_rows=[
            ("RTN, no training", error.rtn),
            (f"PTQ ({data.run.init}), no training", error.ptq),
            (f"QAT ({data.run.method}), fake-quantized", error.qat),
            ("QAT, packed", error.packed),
        ],
        switching=any(variant.activation_bits is not None for variant in data.quality.variants),
        attributes=list(data.quality.variants[0].accuracy) if data.quality.variants else [],
        trajectory_agrees=agrees,
        trajectory_floor_db=TRAJECTORY_PSNR_FLOOR_DB,
        layer_totals=_layer_totals(data),
    )


def _encoded(comparisons: Sequence[VideoComparison]) -> Iterator[list[ShownVideo]]:
    """The tiles of each comparison; on all cores, which nothing else uses when a page is made."""
    return in_threads((partial(_shown_videos, comparison) for comparison in comparisons), threads=idle_threads())


def _shown_videos(comparison: VideoComparison) -> list[ShownVideo]:
    tiles = (
        ("Teacher", comparison.teacher),
        ("PTQ start", comparison.start),
        ("Fake-quantized", comparison.fake_quantized),
        ("Packed", comparison.packed),
    )
    present = [(label, frames) for label, frames in tiles if frames is not None]
    # All are encoded first: that checks their shapes, and says what is wrong with one.
    shown = [shown_video(frames, label=label, fps=comparison.fps, psnr_db=None) for label, frames in present]
    teacher, *others = (torch.from_numpy(np.array(frames)) for _, frames in present)
    measured = [psnr_db(frames, teacher, max_value=255.0) for frames in others]
    return [shown[0], *(replace(tile, psnr_db=value) for tile, value in zip(shown[1:], measured, strict=True))]


def _layer_totals(data: ReportData) -> dict[str, float]:
    """Sums over the quantized layers: their weights, the bytes of these in bf16 (two each), and packed."""
    num_weights = sum(math.prod(layer.shape) for layer in data.layers)
    packed = sum(layer.num_bytes for layer in data.layers)
    return {"num_weights": num_weights, "bf16": 2 * num_weights, "packed": packed}
