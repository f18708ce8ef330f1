"""`export=` of `ptq` and `train`: whether its targets will carry the model, before hours of computation, and the exports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qvgen.config.schema.export import ExportConfig, ExportNames
from qvgen.config.schema.train import TrainConfig
from qvgen.deploy.exported_model import fits_of
from qvgen.deploy.exporters.base import Publisher, Target
from qvgen.deploy.transformer_class import check_can_export
from qvgen.errors import UserError
from qvgen.layers.attention_swap import quantized_attentions
from qvgen.layers.layer_form import LayerForm
from qvgen.layers.packed_linear import PackedLinear
from qvgen.layers.swap import quantized_layers
from qvgen.quant.width_table import WidthTable
from qvgen.training.design.meta_model import Prepared, build_student
from qvgen.verbs import export
from qvgen.verbs._parts import student_design

FOLDER = "exported"
"""Folder of a run with one folder for each target."""


def refuse_exports(config: TrainConfig, *, why: str) -> None:
    """Raise UserError where exports are asked for and nothing will be packed."""
    if config.export:
        raise UserError(f"export={','.join(config.export)} has nothing to write: {why}; leave it out")


def check_exports(config: TrainConfig, student: Prepared | None) -> None:
    """Find out without weights whether each target will carry the packed model exactly.

    Args:
        config: The run's.
        student: What :func:`qvgen.training.start.student_check.check_student` returned.

    Raises:
        UserError: A target that will not, and why; or one that can't upload what it was asked to upload.
    """
    if not config.export:
        return
    skeleton, _ = student or build_student(config.model, student_design(config))
    layers = {name: _as_packed(layer, config) for name, layer in quantized_layers(skeleton).items()}
    names, attentions = getattr(type(config.model), "original_names", None), tuple(quantized_attentions(skeleton))
    for name, target in config.export.items():
        check_can_export(type(skeleton).__name__, target, target=name)
        if isinstance(target, Publisher):
            target.check_upload()
        fits = fits_of(layers, target, base_name=config.names.model, names=names, attentions=attentions)
        misfits = {layer: fit.reasons for layer, fit in fits.items() if fit.reasons}
        if misfits:
            raise UserError(_refusal(name, target, misfits, config))


def _as_packed(layer: Any, config: TrainConfig) -> PackedLinear:
    """The layer as it will be packed, without values, with all that the PTQ method may add to it."""
    kept = student_design(config).phi_kept_rank
    form, additions = LayerForm.folded(layer, phi_rank=kept), getattr(config.init, "additions", frozenset())
    if "smoothing" in additions:
        form = replace(form, input_scale=True)
    if "branch" in additions:
        rank = min(int(getattr(config.init, "rank", 1)), layer.in_features, layer.out_features)
        form = replace(form, branch_rank=form.branch_rank + rank)
    if (widths := config.activation_switch.widths) is not None:
        form = replace(form, width_table=WidthTable(switch=widths))
    bias = layer.bias is not None
    shape = (layer.in_features, layer.out_features)
    return PackedLinear(*shape, bias=bias, form=form, noise_band=layer.noise_band, kernel="reference", device="meta")


def _refusal(name: str, target: Target, misfits: Mapping[str, tuple[str, ...]], config: TrainConfig) -> str:
    layer, reasons = next(iter(misfits.items()))
    instead = f"write profile={' or '.join(target.profiles)}" if target.profiles else "choose another init"
    what = f"profile={config.profile.name} {config.profile.label} with init={config.names.init}"
    return (
        f"export={name} would not carry {what} exactly: {layer} and {len(misfits) - 1} other layers will have "
        f"{', '.join(reasons)}; {instead}, or leave export out and use `qvgen export approximate=true` afterwards"
    )


def planned_exports(config: TrainConfig) -> list[str]:
    """Lines of a dry run about the exports."""
    return [f"export: {name}, exactly, to {config.run_dir / FOLDER / name}" for name in config.export]


def write_exports(config: TrainConfig) -> None:
    """Export the packed model of a run that is done; what an earlier call of the run exported is replaced."""
    for name, target in config.export.items():
        packed, out = config.run_dir / "packed", config.run_dir / FOLDER / name
        export.run(
            ExportConfig(
                packed=packed,
                target=name,
                export=target,
                out=out,
                approximate=False,
                overwrite=True,
                dry_run=False,
                debug=config.debug,
                names=ExportNames(export=name),
            )
        )
