"""The report of a run: report.html, one file that needs nothing else, and report.json for other programs.

Videos are mp4 inside the page, curves are SVG, style and script are inline. A Content-Security-Policy in the page
forbids every network request and every script but the page's own (named by its hash), so that a prompt, which is
anybody's text, can neither load nor run anything; the templates escape it as well.

Left out: what is measured. The numbers come in as ReportData; only the PSNR under each video is computed here, from
the very frames that are shown.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from importlib import resources
from pathlib import Path

import jinja2
import numpy as np
import torch

from qvgen.evaluation.bit_section import build_bit_section, section_json
from qvgen.evaluation.bit_table import Allocation, read_allocation
from qvgen.evaluation.canvas import Series
from qvgen.evaluation.charts import draw_charts, read_history
from qvgen.evaluation.metrics import psnr_db
from qvgen.evaluation.report_data import ReportData, ValidationVideo, VideoComparison
from qvgen.evaluation.report_json import to_json_dict
from qvgen.evaluation.report_video import ShownVideo, shown_video
from qvgen.evaluation.validation_files import DIRECTORY, read_validation
from qvgen.evaluation.validation_section import build_section
from qvgen.run_directory import atomic_write
from qvgen.run_identity import Change, read_changes

TRAJECTORY_PSNR_FLOOR_DB = 50.0
"""Packed and fake-quantized videos agree from this PSNR on; there the RMS difference is 0.8 levels of 255."""

_DASH = "\N{EN DASH}"


def write_report(run_dir: Path, data: ReportData) -> Path:
    """Write run_dir/report.json and run_dir/report.html; each is there whole or as it was.

    The curves are read from run_dir/metrics.csv; without that file the page says so. What was sampled while training is
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
    page = render_html(data, read_history(run_dir / "metrics.csv"), validation, allocation, changes)
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
) -> str:
    """Return the page as text.

    Args:
        data: everything that is shown.
        history: curves by name, as :func:`qvgen.evaluation.charts.read_history` returns them.
        validation: what was sampled while training, in order of step and prompt; its videos are read.
        allocation: which bits every layer got, and of what; None where all have the same.
        changes: facts that were others when the run went on, as it was told to; the page says so on top.
    """
    script = _template_text("report.js").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    error = data.relative_error
    return (
        _templates()
        .get_template("report.html.j2")
        .render(
            data=data,
            charts=draw_charts(history, ptq_error=error.ptq),
            validation=build_section(validation, last_step=data.run.steps),
            mixed=build_bit_section(allocation),
            changes=changes,
            comparisons=[(video, _shown_videos(video)) for video in data.videos],
            error_rows=[
                ("RTN, no training", error.rtn),
                (f"PTQ ({data.run.init}), no training", error.ptq),
                (f"QAT ({data.run.method}), fake-quantized", error.qat),
                ("QAT, packed", error.packed),
            ],
            switching=any(variant.activation_bits is not None for variant in data.quality.variants),
            attributes=list(data.quality.variants[0].accuracy) if data.quality.variants else [],
            trajectory_agrees=data.checks.trajectory_psnr_db >= TRAJECTORY_PSNR_FLOOR_DB,
            trajectory_floor_db=TRAJECTORY_PSNR_FLOOR_DB,
            layer_totals=_layer_totals(data),
            script=script,
            script_hash=digest,
            style=_template_text("report.css"),
        )
    )


def _shown_videos(comparison: VideoComparison) -> list[ShownVideo]:
    tiles = (
        ("Teacher", comparison.teacher),
        ("Fake-quantized", comparison.fake_quantized),
        ("Packed", comparison.packed),
    )
    # All are encoded first: that checks their shapes, and says what is wrong with one.
    shown = [shown_video(frames, label=label, fps=comparison.fps, psnr_db=None) for label, frames in tiles]
    teacher, *others = (torch.from_numpy(np.array(frames)) for _, frames in tiles)
    measured = [psnr_db(frames, teacher, max_value=255.0) for frames in others]
    return [shown[0], *(replace(tile, psnr_db=value) for tile, value in zip(shown[1:], measured, strict=True))]


def _layer_totals(data: ReportData) -> dict[str, float]:
    """Sums over the quantized layers: their weights, the bytes of these in bf16 (two each), and packed."""
    num_weights = sum(math.prod(layer.shape) for layer in data.layers)
    packed = sum(layer.num_bytes for layer in data.layers)
    return {"num_weights": num_weights, "bf16": 2 * num_weights, "packed": packed}


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qvgen.evaluation", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=format_number,
        db=format_db,
        size=format_bytes,
        share=format_share,
        factor=format_factor,
        count=format_count,
    )
    return environment


def _template_text(name: str) -> str:
    return resources.files("qvgen.evaluation").joinpath("templates", name).read_text(encoding="utf-8")


def format_number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, a dash for None.

    >>> format_number(0.05), format_number(1234.6), format_number(0.0000213), format_number(0.0)
    ('0.0500', '1235', '2.13e-05', '0')
    """
    if value is None:
        return _DASH
    if not math.isfinite(value) or value == 0:
        return "\N{INFINITY}" if value == math.inf else f"{value:g}"
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:#.{digits}g}".removesuffix(".")


def format_db(value: float | None) -> str:
    """Decibels with one decimal; infinity is spelled out.

    >>> format_db(31.26), format_db(float("inf")), format_db(None)
    ('31.3 dB', '∞ (identical)', '–')
    """
    if value is None:
        return _DASH
    return "\N{INFINITY} (identical)" if value == math.inf else f"{value:.1f} dB"


def format_bytes(value: float) -> str:
    """Bytes in the largest decimal unit that keeps the number above 1.

    >>> format_bytes(512), format_bytes(493_056), format_bytes(3.4e9)
    ('512 B', '493 kB', '3.4 GB')
    """
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f} B"


def format_share(value: float | None) -> str:
    r"""Per cent with one decimal; a share that is not zero never reads 0.0 %.

    >>> format_share(0.9844), format_share(0.00001), format_share(0.0), format_share(None)
    ('98.4\u202f%', '0.001\u202f%', '0\u202f%', '–')
    """
    if value is None:
        return _DASH
    percent = 100 * value
    number = f"{percent:.2g}" if 0 < percent < 0.05 else "0" if percent == 0 else f"{percent:.1f}"
    return f"{number}\N{NARROW NO-BREAK SPACE}%"


def format_factor(value: float, reference: float) -> str:
    """Ratio of two numbers with a multiplication sign; a dash if the reference is 0 or one is not finite.

    >>> format_factor(0.05, 0.2)
    '0.250×'
    """
    if not (math.isfinite(value) and math.isfinite(reference)) or reference == 0:
        return _DASH
    return f"{format_number(value / reference)}\N{MULTIPLICATION SIGN}"


def format_count(value: int) -> str:
    """Whole number with thin spaces between thousands."""
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
