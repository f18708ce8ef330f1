"""One call of the kernels' operators for a packed layer: its tensors, and which of the two operators it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qvgen.layers.layer_form import LayerForm
from qvgen.layers.layer_input import LayerInput
from qvgen_kernels import LinearSpec, LinearTensors, packed_linear
from qvgen_kernels.fused_op import fused_linear

Prepacked = tuple[str, LinearSpec, list[Tensor]]
"""Name of a backend, the layer as it knows it, and its copy of the weight."""


def call_tensors(
    params: tuple[Tensor, Tensor], *, form: LayerForm, bias: Tensor | None, floats: Sequence[Tensor | None]
) -> LinearTensors:
    """The tensors of one call of an operator.

    Args:
        params: What :meth:`PackedLinear.row_params` gives for the call's rows.
        form: The layer's form.
        bias: float32 [N] or None.
        floats: The layer's input_scale, branch_down and branch_up.
    """
    first, second = (value.squeeze(-1) for value in params)
    input_scale, branch_down, branch_up = floats
    return LinearTensors(
        bias=bias,
        clip_low=None if form.static or form.profile.activation.symmetric else first,
        clip_high=None if form.static or not form.profile.activation.clip else second,
        input_scale=input_scale,
        row_scale=first if form.static else None,
        row_zero_point=second if form.static else None,
        branch_down=branch_down,
        branch_up=branch_up,
    )


def call(x: Tensor, prepacked: Prepacked, tensors: LinearTensors, given: LayerInput | None) -> Tensor:
    """The outputs for x [..., K], with the steps before it if there are any."""
    kernel, spec, weight = prepacked
    if given is None:
        return packed_linear(x, weight=weight, tensors=tensors, spec=spec, kernel=kernel)
    return fused_linear(
        x, weight=weight, before=given.tensors(), steps=given.steps, tensors=tensors, spec=spec, kernel=kernel
    )


def equal_weights(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two copies of a weight hold the same bytes."""
    return len(first) == len(second) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(first, second, strict=True)
    )
