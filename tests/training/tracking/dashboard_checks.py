"""What an offline wandb run has to hold, section by section: numbers and their axes, tables, pictures, videos, artifacts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

from qvgen.evaluation.report.heat_map import PICTURES
from tests.training.tracking.wandb_records import history

NUMBERS = {
    "train": {"train/loss", "train/gradient_norm", "train/gradient_norm_weights", "train/learning_rate"},
    "phi": {"phi/rank", "phi/gamma_min", "phi/small_share"},
    "quant": {"quant/clip_low_t0", "quant/clip_high_t800"},
    "system": {"system/seconds"},
    "video": {"video/psnr_db", "video/ssim"},
}
MEDIA = {
    "quant/layers": "table-file",
    "quant/weight_sqnr_db_by_layer": "html-file",
    "quant/clip_low_by_layer": "html-file",
    "quant/phi_sigma_max_by_layer": "html-file",
    "video/00": "video-file",
    "eval/videos": "table-file",
}


def check_every_section(records: list[Record], media: Path, *, report: Mapping[str, Any]) -> None:
    """Raise AssertionError where an offline run of a training with validation videos lacks a part of the dashboard.

    Args:
        records: Of the session.
        media: Its folder of tables, pages and videos.
        report: report.json of the training.
    """
    _check_axes(records)
    logged: dict[str, Any] = {}
    for row in history(records):
        logged.update(row)
    for section, names in NUMBERS.items():
        assert names <= logged.keys(), (section, names - logged.keys())
    for name, kind in MEDIA.items():
        assert logged.get(f"{name}/_type") == kind, name
    files = {name: (media.parent / logged[f"{name}/path"]).read_bytes() for name in MEDIA}
    _check_layers(json.loads(files["quant/layers"]), report)
    _check_videos(records, report)
    assert b"<svg" in files["quant/weight_sqnr_db_by_layer"]
    assert PICTURES["weight_sqnr_db"].encode() in files["quant/weight_sqnr_db_by_layer"]
    _check_artifacts(records)


def _check_axes(records: list[Record]) -> None:
    metrics = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
    axes = {metric.glob_name: metric.step_metric for metric in metrics if metric.glob_name}
    assert axes.pop("video/*") == "video/step"
    assert axes == dict.fromkeys(("train/*", "phi/*", "quant/*", "eval/*", "system/*"), "trainer/global_step")


def _check_artifacts(records: list[Record]) -> None:
    """The packed files by name and checksum alone, which is what ``logger.upload=report`` asks for; the report whole."""
    found = {
        record.artifact.type: record.artifact for record in records if record.WhichOneof("record_type") == "artifact"
    }
    model = {entry.path: entry.ref for entry in found["model"].manifest.contents}
    assert model.keys() >= {"model.safetensors", "manifest.json"}
    assert all(reference.startswith("file://") for reference in model.values())
    report = {entry.path: entry.ref for entry in found["report"].manifest.contents}
    assert report == {"report.html": "", "report.json": ""}


def _check_layers(table: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    names = [row[table["columns"].index("layer")] for row in table["data"]]
    assert names == [layer["name"] for layer in report["layers"]]
    decibels = [row[table["columns"].index("weight_sqnr_db")] for row in table["data"]]
    assert all(3 < value < 60 for value in decibels)


def _check_videos(records: list[Record], report: Mapping[str, Any]) -> None:
    """The table of videos, which is an artifact of its own: of each prompt's four videos the file that the run wrote."""
    artifacts = [record.artifact for record in records if record.WhichOneof("record_type") == "artifact"]
    entries = [{entry.path: entry for entry in artifact.manifest.contents} for artifact in artifacts]
    (files,) = [found for found in entries if "eval/videos.table.json" in found]
    table = json.loads(Path(files.pop("eval/videos.table.json").local_path).read_text())
    assert table["columns"] == ["prompt", "seed", "teacher", "ptq-start", "fake-quantized", "packed"]
    assert [row[:2] for row in table["data"]] == [[video["prompt"], video["seed"]] for video in report["videos"]]
    shown = [cell["path"] for row in table["data"] for cell in row[2:]]
    assert all(files[path].size > 0 for path in shown)
    assert len(shown) == 4 * len(report["videos"])
