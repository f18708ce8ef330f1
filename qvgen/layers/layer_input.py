"""Steps of a block before a packed layer, handed to the layer itself: norm, modulation, type and function.

A kernel then reads the input once and writes its codes (kernels/README.md, "Input steps"); the results are those of torch's
operators before the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qvgen_kernels.input_steps import InputSteps, InputTensors, apply_steps

_NO_STEPS = InputSteps()


class LayerInput(NamedTuple):
    """The steps for an input [B, n, K].

    Attributes:
        steps: The part of them that is no tensors.
        gain: [B, s, K], factor after the norm, 1 + scale of an adaptive norm; s is 1, n, or as ``row`` has it.
        shift: [B, s, K], added after it.
        row: int32 [B, n], which of the B * s rows of gain and shift each row of the input takes; None: s is 1 or n.
        norm_weight: [K] or None, of the norm.
        norm_bias: [K] or None.
    """

    steps: InputSteps = _NO_STEPS
    gain: Tensor | None = None
    shift: Tensor | None = None
    row: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None

    def of(self, index: Tensor | None) -> LayerInput:
        """The steps of some entries along the first dimension of the input; None: all of them."""
        if index is None or self.gain is None or self.shift is None:
            return self
        if self.row is not None:
            return self._replace(row=self.row[index])
        return self._replace(gain=self.gain[index], shift=self.shift[index])

    def of_tokens(self, place: slice) -> LayerInput:
        """The steps of some rows of every entry."""
        if self.row is not None:
            return self._replace(row=self.row[:, place])
        if self.gain is None or self.shift is None or self.gain.shape[1] == 1:
            return self
        return self._replace(gain=self.gain[:, place], shift=self.shift[:, place])

    def tensors(self) -> InputTensors:
        """Their tensors as a kernel takes them, with a row for each row of the input or of a sample."""
        gain, shift = (None if rows is None else rows.flatten(0, 1) for rows in (self.gain, self.shift))
        row = None if self.row is None else self.row.flatten()
        return InputTensors(gain, shift, row, self.norm_weight, self.norm_bias)

    def apply(self, x: Tensor) -> Tensor:
        """Take x [B, n, K] through the steps before a layer that is not packed."""
        rows = apply_steps(x.reshape(-1, x.shape[-1]), tensors=self.tensors(), steps=self.steps)
        return rows.reshape(x.shape)


def enter(layer: nn.Module, x: Tensor, given: LayerInput) -> Tensor:
    """The outputs of a layer for an input with steps: of one that takes them, or of any other after them."""
    found: Tensor = layer(x, given=given) if getattr(layer, "takes_input_steps", False) else layer(given.apply(x))
    return found


def entered_input(arguments: tuple[Tensor, ...], keywords: Mapping[str, Any]) -> Tensor:
    """The input that a layer quantizes, from what a forward pre-hook gets: behind the steps that its block hands to it."""
    given: LayerInput | None = keywords.get("given")
    return arguments[0] if given is None else given.apply(arguments[0])


def modulated(dtype: torch.dtype, gain: Tensor | None = None, shift: Tensor | None = None) -> LayerInput:
    """The steps that multiply by a gain, add a shift, both [B, s, K], and round to a type."""
    return LayerInput(InputSteps(dtype=_NAMES[dtype]), gain, shift)


def normed(
    norm: nn.LayerNorm, dtype: torch.dtype, gain: Tensor | None = None, shift: Tensor | None = None
) -> LayerInput:
    """The same behind a LayerNorm whose sums are those that kernels/README.md states: other last bits than torch's."""
    steps = InputSteps(norm="layer", eps=norm.eps, dtype=_NAMES[dtype])
    return LayerInput(steps, gain, shift, None, norm.weight, norm.bias)


def with_function(function: str) -> LayerInput:
    """The step that computes a function, "gelu_tanh" or "silu"."""
    return LayerInput(InputSteps(function=function))


_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
