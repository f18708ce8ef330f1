"""Two packed linears as one call, and layers of one input as one layer.

    qvgen::packed_feed_forward      second(f(first(x))), f = GELU with tanh, SiLU or nothing, by blocks of rows
    merge_linears                   the canonical tensors of q, k and v as those of one layer: x is quantized once

*Feed-forward.* On the CPU backends a block of rows goes through both layers before the next one starts: what lies between
them (four times as wide as x) stays in a cache and no memory is touched for it. The arithmetic is that of two calls of the
packed linear with f between: f is computed in float32 from the outputs in x's dtype and rounded to it. f is the library's
own (csrc/cpu/epilogue.inl), one and the same on all CPU backends; torch's differs from it by a rounding in some elements.
Other backends run the three operators.

*Merged layers.* Sums of an output do not depend on the other outputs, so a merged layer computes the same bits as its parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import functional

from qvgen_kernels.contract import LinearSpec, LinearTensors
from qvgen_kernels.cpu import CpuBackend, feed_forward
from qvgen_kernels.op import check_inputs, packed_linear
from qvgen_kernels.registry import get_backend

__all__ = ["FUNCTIONS", "Canonical", "merge_linears", "packed_feed_forward"]

FUNCTIONS = {"none": 0, "gelu_tanh": 1, "silu": 2}
_NAME = "qvgen::packed_feed_forward"
_COUNT = len(LinearTensors._fields)

_library = torch.library.Library("qvgen", "FRAGMENT")
_library.define(
    "packed_feed_forward(Tensor x, Tensor[] first, Tensor[] second, Tensor?[] tensors, str[] specs, str function, "
    "str kernel) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class Canonical(NamedTuple):
    """The tensors of one layer as a checkpoint holds them.

    Attributes:
        planes: uint8, kernels/README.md, "Bytes".
        scale: float32 [N] or [N, G].
        zero_point: uint8 or float32 like the scale; None where symmetric.
        bias: float32 [N] or None.
        spec: the layer.
    """

    planes: Sequence[Tensor]
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None
    spec: LinearSpec


def merge_linears(layers: Sequence[Canonical]) -> Canonical:
    """Layers of one input as one layer whose outputs stand side by side.

    Args:
        layers: Specs that differ in out_features alone and have no branch; all with a bias or all without. Clips, input
            scale and static ranges of the layers must be equal too, which is the caller's to know.

    Returns:
        The merged layer; split its output by the layers' out_features.

    Raises:
        ValueError: specs that differ, a branch, or a bias that some lack.
    """
    first = layers[0].spec
    for layer in layers:
        if replace(layer.spec, out_features=first.out_features) != first:
            raise ValueError(f"{layer.spec} and {first} differ in more than out_features; call them one by one")
        if layer.spec.branch_rank:
            raise ValueError(f"branch_rank={layer.spec.branch_rank}; layers with a branch can't be merged")
        if (layer.bias is None) != (layers[0].bias is None):
            raise ValueError("some of the layers have a bias and some have none; give all of them one")
    zeros = [layer.zero_point for layer in layers if layer.zero_point is not None]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return Canonical(
        planes=[torch.cat(parts) for parts in zip(*(layer.planes for layer in layers), strict=True)],
        scale=torch.cat([layer.scale for layer in layers]),
        zero_point=torch.cat(zeros) if zeros else None,
        bias=torch.cat(biases) if biases else None,
        spec=replace(first, out_features=sum(layer.spec.out_features for layer in layers)),
    )


def _parse(tensors: Sequence[Tensor | None], specs: Sequence[str]) -> tuple[list[LinearTensors], list[LinearSpec]]:
    named = [LinearTensors(*tensors[:_COUNT]), LinearTensors(*tensors[_COUNT:])]
    return named, [LinearSpec.from_string(text) for text in specs]


def _check(x: Tensor, named: Sequence[LinearTensors], specs: Sequence[LinearSpec], function: str) -> None:
    if function not in FUNCTIONS:
        raise ValueError(f"function={function!r} is unknown; use one of {', '.join(FUNCTIONS)}")
    if specs[0].out_features != specs[1].in_features:
        raise ValueError(
            f"the first layer has {specs[0].out_features} outputs and the second {specs[1].in_features} inputs"
        )
    check_inputs(x, named[0], specs[0])
    check_inputs(x.new_empty((prod(x.shape[:-1]), specs[1].in_features), device="meta"), _on_meta(named[1]), specs[1])


def _on_meta(tensors: LinearTensors) -> LinearTensors:
    return LinearTensors(*(None if tensor is None else tensor.to("meta") for tensor in tensors))


def _feed_forward(
    x: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    tensors: Sequence[Tensor | None],
    specs: Sequence[str],
    function: str,
    kernel: str,
) -> Tensor:
    named, parsed = _parse(tensors, specs)
    _check(x, named, parsed, function)
    backend, shape = get_backend(kernel), (*x.shape[:-1], parsed[1].out_features)
    if isinstance(backend, CpuBackend) and not any(spec.branch_rank for spec in parsed) and x.numel():
        rows = x.reshape(-1, parsed[0].in_features)
        layers = tuple(zip((first, second), named, parsed, strict=True))
        return feed_forward(backend, rows, layers, function=FUNCTIONS[function]).reshape(shape)
    hidden = packed_linear(x, weight=first, tensors=named[0], spec=parsed[0], kernel=kernel)
    if function == "gelu_tanh":
        hidden = functional.gelu(hidden, approximate="tanh")
    elif function == "silu":
        hidden = functional.silu(hidden)
    return packed_linear(hidden, weight=second, tensors=named[1], spec=parsed[1], kernel=kernel)


def _fake(
    x: Tensor,
    first: Sequence[Tensor],  # noqa: ARG001 - the operator's signature
    second: Sequence[Tensor],  # noqa: ARG001
    tensors: Sequence[Tensor | None],
    specs: Sequence[str],
    function: str,
    kernel: str,  # noqa: ARG001
) -> Tensor:
    named, parsed = _parse(tensors, specs)
    _check(x, named, parsed, function)
    return x.new_empty((*x.shape[:-1], parsed[1].out_features))


def _backward(ctx: object, grad: Tensor) -> NoReturn:  # noqa: ARG001 - autograd's signature
    raise RuntimeError("packed_feed_forward has no gradient; use torch.no_grad()")


_library.impl("packed_feed_forward", _feed_forward, "CompositeExplicitAutograd")
torch.library.register_fake(_NAME, _fake, lib=_library)
torch.library.register_autograd(_NAME, _backward, lib=_library)


def packed_feed_forward(
    x: Tensor,
    *,
    weights: tuple[Sequence[Tensor], Sequence[Tensor]],
    tensors: tuple[LinearTensors, LinearTensors],
    specs: tuple[LinearSpec, LinearSpec],
    function: str,
    kernel: str,
) -> Tensor:
    """Compute second(function(first(x))).

    Args:
        x: float32, bfloat16 or float16 [..., K].
        weights: what :func:`qvgen_kernels.prepack` returned for the two layers.
        tensors: bias, clips and so on of the two layers.
        specs: the two layers; the second's in_features are the first's out_features.
        function: "gelu_tanh", "silu" or "none".
        kernel: a resolved backend name, the same for both.

    Returns:
        [..., N] of x's dtype, contiguous.

    Raises:
        ValueError: an unknown function, layers that do not fit, or inputs that the packed linear would refuse.
    """
    texts = [spec.to_string() for spec in specs]
    given = [*tensors[0], *tensors[1]]
    y: Tensor = torch.ops.qvgen.packed_feed_forward(
        x, list(weights[0]), list(weights[1]), given, texts, function, kernel
    )
    return y
