"""How the inputs of a model's Linears are distributed, read from the modules that stand before them.

Nothing is run: in the classes of diffusers an activation function stands in front of its Linear among the children of one
module (``FeedForward.net``, ``TimestepEmbedding.act``, ``AdaLayerNorm.silu``). It decides where clips of inputs start that
nobody has seen (:mod:`qvgen.quant.clip_start`), and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from qvgen.quant.clip_start import InputKind

_WORDS: tuple[tuple[str, InputKind], ...] = (("gelu", "gelu"), ("silu", "silu"), ("swish", "silu"))
"""Part of the lower-case name of an activation's class -> the kind of its outputs. Gated ones have longer tails."""

_GATED = ("geglu", "swiglu")
_TIMES_FIRST = ("TimestepEmbedding", "linear_1")
"""The Linear that reads sines of the timestep."""


def input_kinds(model: nn.Module, names: Iterable[str]) -> dict[str, InputKind]:
    """The kind of each named Linear's inputs; ``gaussian`` where nothing says otherwise, as behind a norm."""
    return {name: _kind(model, name) for name in names}


def _kind(model: nn.Module, name: str) -> InputKind:
    parent_name, _, child_name = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if (type(parent).__name__, child_name) == _TIMES_FIRST:
        return "bounded"
    kind: InputKind = "gaussian"
    for other_name, other in parent.named_children():
        if other_name == child_name:
            break
        if isinstance(other, nn.Dropout):
            continue
        word = f"{type(other).__name__} {_own_activation(other)}".lower()
        kind = "gaussian"
        if not any(gated in word for gated in _GATED):
            kind = next((found for part, found in _WORDS if part in word), "gaussian")
    return kind


def _own_activation(module: nn.Module) -> str:
    """The class of the activation function that a wrapper such as diffusers' ``LinearActivation`` holds."""
    held = getattr(module, "activation", None)
    return type(held).__name__ if isinstance(held, nn.Module) else ""
