"""Write a packed model in the format of another runtime, refused where that would not be the same model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvgen import stop_request
from qvgen.config.export_schema import ExportConfig
from qvgen.config.leaf_file import leaf_names
from qvgen.config.leaves import load_leaf
from qvgen.deploy.export_files import write_files
from qvgen.deploy.exported_model import PackedSource, convert, find_fits, open_packed
from qvgen.deploy.exporters.base import Exporter, ExportFile, Fit
from qvgen.deploy.parity import Parity, compare
from qvgen.errors import UserError
from qvgen.evaluation.parity_report import PARITY_JSON, PARITY_PAGE, ExportRecord, parity_content, parity_page
from qvgen.verbs._earlier_result import refuse_earlier
from qvgen.verbs._original_names import original_names_of


def run(config: ExportConfig) -> None:
    """Check, convert, compare, write.

    Raises:
        ValueError: The packed directory is not whole, the target does not carry it, or files of an earlier export are there.
    """
    refuse_earlier(config.out, (PARITY_JSON,), overwrite=config.overwrite)
    exporter: Exporter = config.export
    source = open_packed(config.packed, names=original_names_of(config.packed))
    fits = find_fits(source, exporter)
    misfits = {name: fit for name, fit in fits.items() if fit.reasons}
    if config.dry_run:
        for line in plan(config, fits):
            print(line)
        return
    if misfits and not config.approximate:
        raise UserError(_refusal(config, source, misfits))
    model = convert(source, exporter)
    files = exporter.files(model)
    paths = [*(file.path for file in files), PARITY_PAGE, PARITY_JSON]
    refuse_earlier(config.out, paths, overwrite=config.overwrite)
    parity = compare(source, model, exporter=exporter, fits=fits)
    _write(config, source, files, parity)
    for line in summary(config, parity):
        print(line)


def plan(config: ExportConfig, fits: Mapping[str, Fit]) -> list[str]:
    """What the verb would do."""
    lines = [f"would write {len(fits)} layers of {config.packed} to {config.out} as target={config.target}"]
    runs_as = Counter(fit.runs_as for fit in fits.values())
    lines.append("runs as " + ", ".join(f"{label} ({count})" for label, count in runs_as.items()))
    for reason, count in Counter(reason for fit in fits.values() for reason in fit.reasons).items():
        lines.append(f"not exact: {reason} ({count} layers)")
    return lines


def summary(config: ExportConfig, parity: Parity) -> list[str]:
    """What was written, and how it compares, in a few lines."""
    changed = sum(bool(layer.fit.reasons) for layer in parity.layers)
    lines = [f"exported: {config.out} ({len(parity.layers)} layers, {changed} of them not as trained)"]
    if parity.exact:
        lines.append("by the target's own arithmetic every value is equal to the packed model's")
    if parity.model is not None and parity.model.max_abs:
        dtype = config.export.dtype
        rounded = f", biases and other weights in {dtype}" if dtype else ""
        lines.append(f"whole model{rounded}: relative error {parity.model.error:.3g} against the packed one")
    return [*lines, f"report: {config.out / PARITY_PAGE}"]


def _refusal(config: ExportConfig, source: PackedSource, misfits: Mapping[str, Fit]) -> str:
    """Why the target does not carry the checkpoint exactly, and what would."""
    name, fit = next(iter(misfits.items()))
    profile = source.layers[name].profile
    exporter: Exporter = config.export
    others = [other for other in leaf_names("export") if other != config.target and _carries(other, source)]
    ways = [f"train or `qvgen ptq` with profile={' or '.join(exporter.profiles)}"] if exporter.profiles else []
    ways += [f"choose target={' or '.join(others)}"] if others else []
    return (
        f"target={config.target} does not carry profile={profile.name} {profile.label} exactly: {name} and "
        f"{len(misfits) - 1} other layers have {', '.join(fit.reasons)}; {', '.join(ways)}, or write approximate=true to "
        "export it anyway"
    )


def _carries(target: str, source: PackedSource) -> bool:
    """Whether another target, one that quantizes inputs, carries the checkpoint exactly."""
    try:
        fits = find_fits(source, load_leaf("export", target)).values()
    except ValueError:
        return False
    return all(fit.quantizes_inputs and not fit.reasons for fit in fits)


def _write(config: ExportConfig, source: PackedSource, files: list[ExportFile], parity: Parity) -> None:
    """Write the target's files, then the page, and parity.json last: a folder that has it is whole."""
    out: Path = config.out
    out.mkdir(parents=True, exist_ok=True)
    stop_request.note(f"while exporting, {out} is not whole until it has {PARITY_JSON}")
    (out / PARITY_JSON).unlink(missing_ok=True)
    written = write_files(out, files)
    record = ExportRecord(
        target=config.target,
        exporter=config.export,
        approximate=config.approximate,
        manifest=source.manifest,
        files=written,
    )
    content: dict[str, Any] = parity_content(record, parity)
    page = ExportFile(path=PARITY_PAGE, content=parity_page(record, parity).encode())
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_files(out, [page, ExportFile(path=PARITY_JSON, content=text.encode())])
