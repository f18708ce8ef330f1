"""Write a packed model in the format of another runtime, refused where that would not be the same model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from qvgen import stop_request
from qvgen.config.leaf_file import leaf_names
from qvgen.config.leaves import load_leaf
from qvgen.config.schema.export import ExportConfig
from qvgen.deploy.export_files import write_files
from qvgen.deploy.exported_model import PackedSource, convert, find_fits, open_packed
from qvgen.deploy.exporters.base import Exporter, ExportFile, Fit, PackedTarget, Publisher, Target
from qvgen.deploy.parity import Parity, compare, compare_packed
from qvgen.deploy.staged_folder import SCRATCH, staged
from qvgen.deploy.tensor_spool import TensorSpool
from qvgen.deploy.transformer_class import check_can_export
from qvgen.errors import UserError
from qvgen.evaluation.parity_report import PARITY_JSON, PARITY_PAGE, ExportRecord, parity_content, parity_page
from qvgen.verbs._earlier_export import earlier_files
from qvgen.verbs._earlier_result import refuse_earlier
from qvgen.verbs._original_names import original_names_of

Written = dict[str, dict[str, str | int]]


def run(config: ExportConfig) -> None:
    """Check, convert, compare, write.

    Raises:
        ValueError: The packed directory is not whole, the target does not carry it, or files of an earlier export are there.
    """
    target: Target = config.export
    if isinstance(target, Publisher):
        target.check_upload()
    refuse_earlier(config.out, (PARITY_JSON,), overwrite=config.overwrite)
    source = open_packed(config.packed, names=original_names_of(config.packed))
    check_can_export(source.manifest.transformer, target, target=str(config.target))
    fits = find_fits(source, target)
    misfits = {name: fit for name, fit in fits.items() if fit.reasons}
    if config.dry_run:
        for line in plan(config, fits):
            print(line)
        return
    if misfits and not config.approximate:
        raise UserError(_refusal(config, source, misfits))
    stop_request.note(f"while exporting; {config.packed} is whole, and {config.out} as it was")
    replaced = earlier_files(config.out, report=PARITY_JSON)
    with staged(config.out, last=PARITY_JSON, replaced=replaced) as folder:
        parity, written = _write(config, source, fits, folder)
        _report(config, source, parity, written, folder)
    for line in summary(config, parity):
        print(line)
    if isinstance(target, Publisher) and (uploaded := target.publish(config.out)):
        print(uploaded)


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
    target: Target = config.export
    others = [other for other in leaf_names("export") if other != config.target and _carries(other, source)]
    ways = [f"train or `qvgen ptq` with profile={' or '.join(target.profiles)}"] if target.profiles else []
    ways += [f"choose target={' or '.join(others)}"] if others else []
    return (
        f"target={config.target} does not carry profile={profile.name} {profile.label} exactly: {name} and "
        f"{len(misfits) - 1} other layers have {', '.join(fit.reasons)}; {', '.join(ways)}, or write approximate=true to "
        "export it anyway"
    )


def _carries(name: str, source: PackedSource) -> bool:
    """Whether another runtime's target, one that quantizes inputs, carries the checkpoint exactly."""
    target = load_leaf("export", name)
    try:
        fits = find_fits(source, target).values()
    except ValueError:
        return False
    return isinstance(target, Exporter) and all(fit.quantizes_inputs and not fit.reasons for fit in fits)


def _write(config: ExportConfig, source: PackedSource, fits: Mapping[str, Fit], folder: Path) -> tuple[Parity, Written]:
    """Write the target's files to a folder, and compare them with the packed model."""
    target: Target = config.export
    if isinstance(target, PackedTarget):
        files = target.packed_files(source.directory, source.manifest)
        _refuse_files(config, files)
        written = write_files(folder, files)
        copy = open_packed(folder / target.packed_folder(source.manifest), names=None)
        return compare_packed(source, copy, fits=fits), written
    if not isinstance(target, Exporter):
        raise UserError(
            f"target={config.target} makes a {type(target).__name__}, which writes nothing; see "
            "qvgen.deploy.exporters.base.Exporter"
        )
    model = convert(source, target, spool=TensorSpool(folder / SCRATCH))
    files = target.files(model)
    _refuse_files(config, files)
    parity = compare(source, model, exporter=target, fits=fits)
    return parity, write_files(folder, files)


def _refuse_files(config: ExportConfig, files: Sequence[ExportFile]) -> None:
    names = [*(file.path for file in files), PARITY_PAGE, PARITY_JSON]
    refuse_earlier(config.out, names, overwrite=config.overwrite)


def _report(config: ExportConfig, source: PackedSource, parity: Parity, written: Written, folder: Path) -> None:
    """Write parity.html and parity.json: a folder that has the latter is whole."""
    record = ExportRecord(
        target=str(config.target),
        exporter=config.export,
        approximate=config.approximate,
        manifest=source.manifest,
        files=written,
    )
    page = ExportFile(path=PARITY_PAGE, content=parity_page(record, parity).encode())
    text = json.dumps(parity_content(record, parity), indent=1, allow_nan=False) + "\n"
    write_files(folder, [page, ExportFile(path=PARITY_JSON, content=text.encode())])
