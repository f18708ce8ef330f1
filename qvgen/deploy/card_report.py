"""Recipe and measurements in a model card, out of the run's report.json: each with its seed, and nothing of another run.

No path of a machine is shown, and what was not measured is not there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qvgen.config.plain_json import read_json
from qvgen.deploy.card_table import card_table
from qvgen.deploy.manifest import Manifest
from qvgen.errors import UserError

log = logging.getLogger(__name__)

REPORT_FILE = "report.json"

_SAME = ("bits", "method", "init", "seed", "steps")
"""Entries that a report and the packed folder of the same run both have."""

_VARIANTS = {
    "rtn": "round to nearest",
    "ptq": "PTQ start",
    "qat": "trained, fake-quantized",
    "packed": "packed",
}


def read_report(file: Path | None, packed: Path, manifest: Manifest, *, size: int) -> Mapping[str, Any] | None:
    """The report of the run that made a packed folder.

    Args:
        file: The report.json; None: the one beside the packed folder, if there is one and it is that run's.
        packed: The packed folder.
        manifest: Its manifest.
        size: Bytes of its weights.

    Returns:
        Its content; None where there is none.

    Raises:
        UserError: A file that was named is no report, or another run's.
    """
    beside = packed.parent / REPORT_FILE
    source = file or (beside if beside.is_file() else None)
    if source is None:
        return None
    report = read_json(source)
    if not isinstance(report, dict) or not isinstance(report.get("relative_error"), dict):
        raise UserError(f"{source} is no report of a run; give the report.json that train or ptq wrote, or none")
    if (other := _difference(report, manifest, size=size)) is None:
        return report
    if file is None:  # a folder that was folded again, or put beside another run
        log.warning("%s is the report of another model (%s): the model card shows none of its numbers", source, other)
        return None
    raise UserError(f"{source} is the report of another model than {packed}: {other}; give the report of the same run")


def _difference(report: Mapping[str, Any], manifest: Manifest, *, size: int) -> str | None:
    """The difference between a report and the packed folder, in words; None where there is none."""
    theirs = {"model": report.get("model"), **{key: report.get(key) for key in _SAME}}
    theirs["bytes"] = (report.get("bytes") or {}).get("packed")
    bits = {"bits": str(manifest.training["bits"])} if "bits" in manifest.training else {}
    ours = {"model": manifest.base_name, **dict(manifest.training), **bits, "bytes": size}
    theirs["bits"] = str(theirs["bits"])
    for key, value in theirs.items():
        if key in ours and ours[key] != value:
            return f"{key} is {value} there and {ours[key]} here"
    return None


def recipe_text(report: Mapping[str, Any] | None) -> str:
    """How the model was made, from the configuration that the report holds."""
    text = report.get("config") if report is not None else None
    config = yaml.safe_load(text) if isinstance(text, str) else None
    if report is None or not isinstance(config, Mapping):
        return "Unknown: the run's report is not part of this folder."
    names, calibration = config.get("names") or {}, config.get("calibration") or {}
    common = {"data": names.get("data"), "videos": _video_size(config), "seed": report.get("seed")}
    measured = (report.get("relative_error_measured_on") or {}).get("split")
    if report.get("method") == "ptq":
        init = config.get("init") or {}
        settings = [f"{key}={value}" for key, value in init.items() if isinstance(value, bool | int | float)]
        steps = f"{calibration.get('videos')} videos of {calibration.get('steps')} steps, if the method looks at any"
        made = {"training": "none: post-training quantization alone", "its settings": ", ".join(settings)}
        return card_table({**common, **made, "calibration": steps, "measured on": measured})
    optim, phi = config.get("optim") or {}, config.get("phi") or {}
    return card_table(
        {
            **common,
            "optimizer steps": report.get("steps"),
            "batch size": config.get("batch_size"),
            "optimizer": optim.get("name"),
            "learning rate": optim.get("learning_rate"),
            "weight decay": optim.get("weight_decay"),
            "rank of the helper Phi, at first": phi.get("ranks") or phi.get("rank"),
            "rank of the helper Phi, at the end": _helper_rank(report),
            "versions": _versions(report),
        }
    )


def _helper_rank(report: Mapping[str, Any]) -> object:
    """Rank of Phi when the model was folded, and that it stayed, where it did."""
    rank = report.get("phi_rank_final")
    return f"{rank}, kept as a low-rank branch" if report.get("phi_kept") else rank


def _video_size(config: Mapping[str, Any]) -> str | None:
    """Size of the videos that the model was trained or measured on; None for one that says it in another way."""
    model = config.get("model") or {}
    width, height, frames = (model.get(key) for key in ("width", "height", "num_frames"))
    return f"{frames} frames of {width} x {height} pixels" if width and height and frames else None


def _versions(report: Mapping[str, Any]) -> str:
    versions = report.get("versions") or {}
    return ", ".join(f"{name} {versions[name]}" for name in ("qvgen", "torch", "diffusers") if name in versions)


def measured_text(report: Mapping[str, Any] | None) -> str:
    """Errors, what they were measured on, and the videos; all with their seeds."""
    error = {} if report is None else report["relative_error"]
    rows = [f"| {name} | {error[key]:.4g} |" for key, name in _VARIANTS.items() if _is_number(error.get(key))]
    if report is None or not rows:
        return "Nothing was measured in the run that made this folder, or its report is not at hand."
    on = report.get("relative_error_measured_on") or {}
    text = "\n".join(["| model | relative error of its predictions |", "|---|---|", *rows])
    text += (
        f"\n\nMean of |y - y_teacher|^2 / |y_teacher|^2 on {on.get('num_samples')} samples ({on.get('split')}), "
        f"seed {on.get('seed')}."
    )
    text += f" {on['caution']}" if on.get("caution") else ""
    if report.get("packed_codes_equal") is True:
        text += " The packed codes are those of the fake-quantized model."
    quality = report.get("quality") or {}
    if found := _videos(quality):
        count, seeds, steps = (quality.get(key) for key in ("num_videos", "seeds", "num_steps"))
        text += f"\n\n{found}\n\n{count} videos, seeds {seeds}, {steps} steps."
    return text


def speed_text(report: Mapping[str, Any] | None) -> str:
    """Seconds and memory of a video, of the full-precision model and the packed one, with the machine and the kernels."""
    sampling = (report or {}).get("sampling") or {}
    costs = sampling.get("variants") or {}
    rows = [
        f"| {name} | {', '.join(cost.get('kernels') or ()) or cost.get('dtype')} | {_shown(cost.get('seconds_per_video'))} | "
        f"{_gigabytes(cost.get('weight_bytes'))} | {_gigabytes(cost.get('peak_bytes'))} |"
        for name, cost in costs.items()
    ]
    if not rows:
        return "No video was timed in the run that made this folder, or its report is not at hand."
    head = ["| model | runs on | seconds a video | GB of weights | GB at the peak |", "|---" * 5 + "|"]
    return "\n".join([*head, *rows]) + f"\n\n{sampling.get('device')}; {sampling.get('conditions')}."


def _gigabytes(count: object) -> str:
    return f"{count / 1e9:.3g}" if isinstance(count, int | float) and not isinstance(count, bool) else ""


def _videos(quality: Mapping[str, Any]) -> str:
    columns = {"psnr_db": "PSNR in dB", "ssim": "SSIM", "lpips": "LPIPS"}
    rows = [
        f"| {name} | " + " | ".join(_shown(value.get(key)) for key in columns) + " |"
        for name, value in (quality.get("variants") or {}).items()
        if any(value.get(key) is not None for key in columns)
    ]
    if not rows:
        return ""
    head = ["| videos, against the full-precision model's | " + " | ".join(columns.values()) + " |", "|---" * 4 + "|"]
    return "\n".join([*head, *rows])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: object) -> str:
    """A number; the word of one that is not finite (an infinite PSNR is equality); nothing where it was not measured."""
    return "" if value is None else f"{value:.4g}" if _is_number(value) else str(value)
