"""Make a packed model of a checkpoint of QVGen's own release: its codes, scales, zero points and clips."""

from __future__ import annotations

import json
import logging
from contextlib import closing
from typing import Any

from torch import nn

from qvgen import stop_request
from qvgen.config.schema.imports import ImportConfig
from qvgen.deploy.checkpoint import check_packed, save_packed
from qvgen.deploy.importers.release_check import TOLERANCE
from qvgen.deploy.importers.release_file import ReleaseFile
from qvgen.deploy.importers.release_model import (
    Imported,
    check_same_config,
    count_tokens_without_zero,
    empty_transformer,
    import_release,
)
from qvgen.deploy.importers.sampler_clips import ClipTable, constant_table, step_table
from qvgen.deploy.manifest import MANIFEST_FILE, WEIGHTS_FILE
from qvgen.errors import UserError
from qvgen.models.base import local_arguments
from qvgen.run_directory import atomic_write
from qvgen.verbs._earlier_result import refuse_earlier

log = logging.getLogger(__name__)

RECORD = "import.json"


def run(config: ImportConfig) -> None:
    """Read the headers, convert and check layer by layer, write, check what was written.

    Raises:
        ValueError: The checkpoint is not whole, of another model, of other bits or not finished, or the sampler that its
            clips are laid out for is not the model's; nothing is written then.
    """
    refuse_earlier(config.out, (WEIGHTS_FILE, MANIFEST_FILE, RECORD), overwrite=config.overwrite)
    clips = _clips(config)
    base = _base(config)
    with closing(ReleaseFile.open(config.source, base, name=str(config.names.model))) as release:
        check_same_config(release.config, base, source=config.source, name=str(config.names.model))
        if config.dry_run:
            for line in plan(config, release, clips):
                print(line)
            return
        sha256 = release.sha256
        imported = import_release(release, base, bits=config.bits, clips=clips)
    record = import_record(config, release, imported, clips=clips)
    stop_request.note(f"while importing, {config.out} is not whole until it has {RECORD}")
    save_packed(
        imported.model,
        config.out,
        base_name=str(config.names.model),
        base_revision=_base_revision(config.model),
        base_arguments=_arguments(config),
        training={"method": "imported", "source": release.source.name, "sha256": sha256, "clips": clips.said},
    )
    check_packed(config.out)
    content = {"source": release.source.name, "sha256": sha256, **record}
    atomic_write(config.out / RECORD, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    for line in summary(config, content):
        print(line)


def _clips(config: ImportConfig) -> ClipTable:
    """The tables of clips, laid out for the release's sampler or for all."""
    if not hasattr(config.model, "scheduler") or not hasattr(config.model, "transformer_config"):
        raise UserError(
            f"model={config.names.model} is no model that QVGen's release trains; choose a CogVideoX or a Wan"
        )
    if getattr(config.model, "lora", None) is not None:
        raise UserError("model.lora can't be merged into integer codes; leave it out, or merge it before training")
    if config.clips == "steps":
        if len(config.model.transformer_folders) > 1:
            raise UserError(
                f"clips=steps: model={config.names.model} has two transformers, and the release samples one; write clips=mean"
            )
        return step_table(
            config.model.scheduler(), transformer=config.model.transformer_class, num_steps=config.num_steps
        )
    return constant_table(config.clips)


def _base(config: ImportConfig) -> nn.Module:
    return empty_transformer(config.model.build, config.model.transformer_config)


def _base_revision(family: Any) -> str:
    """The base model's weights, where they are here: importing does without them."""
    folder = family.folder
    here = folder is not None and any((folder.path / family.transformer_folder).glob("*.safetensors"))
    return str(family.revision) if here else ""


def _arguments(config: ImportConfig) -> dict[str, Any]:
    """The family's arguments for the manifest; by default a video has the steps that the clips are laid out for."""
    local = local_arguments(config.model)
    arguments = {key: value for key, value in config.plain["model"].items() if key not in local}
    return {**arguments, "num_inference_steps": config.num_steps} if config.clips == "steps" else arguments


def plan(config: ImportConfig, release: ReleaseFile, clips: ClipTable) -> list[str]:
    """What the verb would do."""
    return [
        f"would import {len(release.layers)} layers of {config.source} as model={config.names.model} "
        f"bits={config.bits.label} into {config.out}",
        f"clips: {clips.said}",
        *([f"LoRAs to be merged: {len(release.loras)} layers"] if release.loras else []),
        *([f"not the release's: {clips.approximate}"] if clips.approximate else []),
    ]


def import_record(
    config: ImportConfig, release: ReleaseFile, imported: Imported, *, clips: ClipTable
) -> dict[str, Any]:
    """What was found and checked, in plain values; the content of import.json."""
    weights = imported.weights
    timestep = 500.0 if clips.timesteps is None else clips.timesteps[0]
    tokens = count_tokens_without_zero(imported.model, timestep=timestep)
    linears = [name for name, module in imported.model.named_modules() if isinstance(module, nn.Linear)]
    return {
        "model": config.names.model,
        "bits": config.bits.label,
        "dtypes": list(imported.dtypes),
        "layers": len(release.layers),
        "full_precision": linears,
        "loras_merged": len(release.loras),
        "clips": clips.said,
        "clips_approximate": clips.approximate,
        "rows": weights.rows,
        "rows_at_both_ends": weights.at_both_ends,
        "rows_without_zero": weights.zero_point_outside,
        "checked": {
            name: {"relative_difference": check.error, "own_rounding": check.own_rounding}
            for name, check in imported.checks.items()
        },
        "not_taken_over": {
            "weight_rounding": (weights.error / max(weights.energy, 1e-30)) ** 0.5,
            "activation_rounding": max(check.own_rounding for check in imported.checks.values()),
            "tokens_without_zero": None if tokens is None else {"found": tokens[0], "of": tokens[1]},
        },
    }


def summary(config: ImportConfig, record: dict[str, Any]) -> list[str]:
    """What was written, and how it compares, in a few lines."""
    lost, checked = record["not_taken_over"], record["checked"]
    largest = max(check["relative_difference"] for check in checked.values())
    lines = [
        f"imported: {config.out} ({record['layers']} layers, {len(record['full_precision'])} Linears in full precision)",
        f"clips: {record['clips']}",
        f"checked: {len(checked)} layers compute what the release computes in float32, to {largest:.1g} "
        f"({TOLERANCE:g} is allowed)",
        f"not taken over: the release's rounding to {' and '.join(record['dtypes'])}, "
        f"{lost['weight_rounding']:.2g} of its weights and {lost['activation_rounding']:.2g} of its layers' outputs",
    ]
    if record["clips_approximate"]:
        lines.append(f"not the release's: {record['clips_approximate']}")
    if record["rows_without_zero"]:
        lines.append(f"rows without 0: {record['rows_without_zero']} of {record['rows']}, with their own zero points")
    if (tokens := lost["tokens_without_zero"]) is not None and tokens["found"]:
        lines.append(
            f"tokens without 0: {tokens['found']} of {tokens['of']} on fixed inputs, which the release clips and a packed "
            "model does not"
        )
    lines.append("layers that read one input have clips of their own each, so they are not merged: a slower model")
    return [*lines, f"report: {config.out / RECORD}"]
