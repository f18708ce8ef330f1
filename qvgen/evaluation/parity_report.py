"""parity.json and parity.html of an export: what is exact, what is not, and by how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qvgen.deploy.exporters.base import Target
from qvgen.deploy.manifest import Manifest
from qvgen.deploy.parity import Difference, LayerParity, Parity
from qvgen.evaluation.json_number import json_number
from qvgen.evaluation.report.page import render_page

PARITY_JSON, PARITY_PAGE = "parity.json", "parity.html"
FORMAT, VERSION = "qvgen-export", 1


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """An export as its report has it.

    Attributes:
        target: Name of the target.
        exporter: The target.
        approximate: Whether layers that it does not carry exactly were asked for.
        manifest: The packed checkpoint's.
        files: Path -> {"sha256", "bytes"}.
    """

    target: str
    exporter: Target
    approximate: bool
    manifest: Manifest
    files: Mapping[str, Mapping[str, str | int]]


def parity_content(record: ExportRecord, parity: Parity) -> dict[str, Any]:
    """The content of parity.json: plain values."""
    manifest = record.manifest
    return {
        "format": FORMAT,
        "version": VERSION,
        "target": record.target,
        "runtime": record.exporter.runtime,
        "bound": record.exporter.bound,
        "approximate": record.approximate,
        "exact": parity.exact,
        "source": {
            "sha256": manifest.sha256,
            "base": {"name": manifest.base_name, "revision": manifest.base_revision},
            "transformer": manifest.transformer,
            "training": manifest.training,
        },
        "other_weights": record.exporter.dtype,
        "model": _difference_content(parity.model),
        "model_arithmetic": _difference_content(parity.arithmetic),
        "model_half_sums": _difference_content(parity.half_sums),
        "layers": [_layer_content(layer) for layer in parity.layers],
        "files": {path: dict(file) for path, file in record.files.items()},
    }


def _layer_content(layer: LayerParity) -> dict[str, Any]:
    return {
        "name": layer.name,
        "trained": layer.trained,
        "runs_as": layer.fit.runs_as,
        "weight": "as trained" if not layer.fit.weight else "quantized again",
        "weight_reasons": list(layer.fit.weight),
        "inputs": _inputs_in_words(layer),
        "input_reasons": list(layer.fit.inputs),
        "output": _difference_content(layer.output),
        "half_sums": _difference_content(layer.half_sums),
    }


def _difference_content(difference: Difference | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    return {"relative_error": json_number(difference.error), "max_abs": json_number(difference.max_abs)}


def _inputs_in_words(layer: LayerParity) -> str:
    if not layer.fit.quantizes_inputs:
        return "not quantized"
    return "in another way" if layer.fit.inputs else "as trained"


def parity_page(record: ExportRecord, parity: Parity) -> str:
    """The page as text; it needs nothing else."""
    return render_page(
        "parity.html.j2",
        content=parity_content(record, parity),
        changed=sum(bool(layer.fit.reasons) for layer in parity.layers),
    )
