"""A packed layer as the kernels describe it."""

from __future__ import annotations

from qvgen.layers.layer_form import LayerForm
from qvgen.quant.width_table import Widths
from qvgen_kernels import LinearSpec


def layer_spec(form: LayerForm, *, in_features: int, out_features: int, widths: Widths | None = None) -> LinearSpec:
    """The kernels' description of a layer; ``widths`` of its table, None: the profile's."""
    weight, activation = form.profile.weight, form.profile.activation
    weight_bits, activation_bits = widths or form.widths
    return LinearSpec(
        in_features=in_features,
        out_features=out_features,
        weight_bits=weight_bits,
        weight_zero_point=weight.zero_point,
        weight_group_size=weight.group_size or 0,
        activation_bits=activation_bits,
        activation_zero_point=activation.zero_point,
        activation_group_size=activation.group_size or 0,
        scale_dtype=activation.scale_dtype,
        rotation=form.profile.rotation,
        rotation_kind=form.profile.rotation_kind,
        activation_arithmetic=activation.arithmetic,
        activation_range="static" if form.static else "dynamic",
        branch_rank=form.branch_rank,
    )
