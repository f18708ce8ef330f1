"""Whether the kernels of a device compute what they claim: each is held to the exact reference on the CPU.

For a kind of layer and a shape, three things of few rows, random codes and inputs of very different sizes:

    codes          the device's quantizer in torch's operators gives the reference's codes, scales and zero points
    accumulators   with scales of 1 the outputs are the integer sums: equal (layers without groups of activations, whose rows
                   can be given a scale)
    outputs        float32 and bfloat16: equal, or of a kernel that rounds its operands within the stated distance
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qvgen.quant.packing import pack_codes
from qvgen.verbs.diagnosis.layer_kind import LayerKind, with_outputs
from qvgen.verbs.diagnosis.machine import without_paths
from qvgen_kernels import LinearSpec, LinearTensors, available_kernels, get_backend, packed_linear, prepack
from qvgen_kernels.reference import FLOAT32_EXACT, quantize_activations
from qvgen_kernels.weight import unpack_planes

ROWS = 5
MAX_OUTPUTS = 512
"""Outputs of a layer that are tested on a CPU, and of all but the first kind elsewhere: the reference takes its time."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison.

    Attributes:
        device: Where the kernel ran.
        kernel: Its name.
        kind: Of the layer.
        shape: KxN.
        what: codes, accumulators or outputs, and the type of the inputs.
        failure: What was found instead; empty where it holds.
    """

    device: str
    kernel: str
    kind: str
    shape: str
    what: str
    failure: str

    def to_json_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Layer:
    """Random canonical tensors of a layer, on the CPU."""

    spec: LinearSpec
    planes: tuple[Tensor, ...]
    scale: Tensor
    zero_point: Tensor | None

    @classmethod
    def random(cls, spec: LinearSpec) -> _Layer:
        generator = torch.Generator().manual_seed(spec.in_features + spec.out_features)
        shape = (spec.out_features, *([spec.num_weight_groups] if spec.weight_group_size else []))
        codes = torch.randint(
            0, 2**spec.weight_bits, (spec.out_features, spec.in_features), generator=generator, dtype=torch.uint8
        )
        zero_point = None
        if spec.weight_zero_point != "none":
            zero_point = torch.randint(0, 2**spec.weight_bits, shape, generator=generator, dtype=torch.uint8)
            zero_point = zero_point if spec.weight_zero_point == "integer" else zero_point.float() + 0.25
        scale = torch.rand(shape, generator=generator) * 0.1 + 0.001
        return cls(spec, pack_codes(codes, bits=spec.weight_bits), scale, zero_point)

    def run(self, x: Tensor, tensors: LinearTensors, *, kernel: str, device: torch.device) -> Tensor:
        """The outputs of a kernel, on the CPU."""
        there = [plane.to(device) for plane in self.planes]
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        weight = prepack(there, scale=self.scale.to(device), zero_point=zero_point, spec=self.spec, kernel=kernel)
        given = LinearTensors(*(None if value is None else value.to(device) for value in tensors))
        y = packed_linear(x.to(device), weight=weight, tensors=given, spec=self.spec, kernel=kernel)
        return y.cpu()


def self_test(device: torch.device, kinds: Sequence[LayerKind], shapes: Sequence[tuple[int, int]]) -> Iterator[Check]:
    """All checks of all kernels that run on a device, but of the reference on the CPU, which is what they are held to.

    The first kind is tested at every shape, the others at the first that they fit.
    """
    for kind in kinds:
        first = kind is kinds[0]
        specs = [kind.spec(*shape) for shape in shapes] if first else [kind.first_spec(shapes)]
        for spec in specs:
            if spec is None:
                continue
            if device.type == "cpu" or not first:
                spec = with_outputs(spec, min(spec.out_features, MAX_OUTPUTS))
            names = [
                name for name in available_kernels(spec, device=device) if (name, device.type) != ("reference", "cpu")
            ]
            yield from _check_layer(spec, kind.name, names, device=device)


def _check_layer(spec: LinearSpec, kind: str, names: Sequence[str], *, device: torch.device) -> Iterator[Check]:
    shape = f"{spec.in_features}x{spec.out_features}"
    x, tensors = _inputs(spec)
    if device.type != "cpu":
        yield Check(
            device=str(device),
            kernel="torch",
            kind=kind,
            shape=shape,
            what="codes",
            failure=_codes_differ(x, tensors, spec, device),
        )
    layer = _Layer.random(spec)
    whole = _with_unit_scales(layer) if not spec.activation_group_size else None
    cases = [("outputs of float32", layer, x, tensors), ("outputs of bfloat16", layer, x.bfloat16(), tensors)]
    if whole is not None:
        ones = LinearTensors(row_scale=torch.ones(ROWS), row_zero_point=torch.full((ROWS,), 1.0))
        few = x / x.abs().amax(1, keepdim=True).clamp(min=1e-9) * spec.activation_qmax
        cases.insert(0, ("accumulators", whole, few, ones))
    for what, case, rows, given in cases:
        expected = case.run(rows, given, kernel="reference", device=torch.device("cpu"))
        for name in names:
            failure = _differs(case, rows, given, expected, kernel=name, device=device)
            yield Check(device=str(device), kernel=name, kind=kind, shape=shape, what=what, failure=failure)


def _inputs(spec: LinearSpec) -> tuple[Tensor, LinearTensors]:
    """Rows of very different sizes with outliers, one of zeros; clip factors where the grid has them."""
    generator = torch.Generator().manual_seed(spec.in_features)
    x = torch.randn(ROWS, spec.in_features, generator=generator)
    x *= 1 + 20 * (torch.rand(x.shape, generator=generator) > 0.99)
    x *= 10.0 ** torch.linspace(-2, 2, ROWS)[:, None]
    x[1] = 0.0
    clips = torch.rand(2, ROWS, generator=generator) * 0.2 + 0.8
    if spec.activation_range == "static":
        return x, LinearTensors(row_scale=clips[0], row_zero_point=torch.ones(ROWS))
    symmetric = spec.activation_zero_point == "none"
    return x, LinearTensors(clip_low=None if symmetric else clips[0], clip_high=clips[1])


def _with_unit_scales(layer: _Layer) -> _Layer:
    """The layer with static ranges, whose outputs are its integer sums."""
    spec = replace(layer.spec, activation_range="static", activation_arithmetic="reciprocal", rotation=0)
    return replace(layer, spec=spec, scale=torch.ones_like(layer.scale))


def _codes_differ(x: Tensor, tensors: LinearTensors, spec: LinearSpec, device: torch.device) -> str:
    try:
        expected = quantize_activations(x, spec=spec, tensors=tensors)
        given = LinearTensors(*(None if value is None else value.to(device) for value in tensors))
        found = quantize_activations(x.to(device), spec=spec, tensors=given)
    except (RuntimeError, TypeError) as error:  # a device may lack an operator
        return without_paths(str(error))
    for name, ours, theirs in zip(("codes", "scales", "zero points"), found, expected, strict=True):
        count = int((ours.cpu() != theirs).sum())
        if count:
            return f"{count} of {theirs.numel()} {name} differ"
    return ""


def _differs(
    layer: _Layer, x: Tensor, tensors: LinearTensors, expected: Tensor, *, kernel: str, device: torch.device
) -> str:
    """What is wrong with the outputs of a kernel; empty where nothing is."""
    try:
        found = layer.run(x, tensors, kernel=kernel, device=device)
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:
        return without_paths(f"{type(error).__name__}: {error}")
    if torch.equal(found, expected):
        return ""
    off = (found.double() - expected.double()).abs()
    allowed = (
        torch.zeros_like(off) if getattr(get_backend(kernel), "exact", True) else _distance(layer, x, tensors, expected)
    )
    count = int((~(off <= allowed)).sum())
    return f"{count} of {off.numel()} outputs differ, by {float(off.max()):.3g} at most" if count else ""


def _distance(layer: _Layer, x: Tensor, tensors: LinearTensors, expected: Tensor) -> Tensor:
    """What a kernel may differ by that multiplies in x's type (kernels/README.md, dequantize)."""
    spec = layer.spec
    operand, scale, _ = quantize_activations(x, spec=spec, tensors=tensors)
    rows = (operand * scale.unsqueeze(-1)).flatten(1).double().abs()
    weight = _dequantized(layer).abs()
    magnitudes, eps = rows @ weight.t(), torch.finfo(x.dtype).eps
    rounded = spec.weight_group_size or spec.activation_group_size or spec.weight_zero_point == "real"
    whole = not rounded and spec.accumulator_bound <= FLOAT32_EXACT
    sums = 0.0 if whole else spec.in_features * 2.0**-24
    return 2 * eps * expected.double().abs() + ((eps if rounded else 0.0) + sums) * magnitudes


def _dequantized(layer: _Layer) -> Tensor:
    """float64 [N, K]."""
    spec = layer.spec
    codes = unpack_planes(layer.planes, spec=spec).double().unflatten(1, (spec.num_weight_groups, -1))
    scale = layer.scale.double().reshape(spec.out_features, -1, 1)
    middle = torch.full_like(scale, 2.0 ** (spec.weight_bits - 1))
    zeros = middle if layer.zero_point is None else layer.zero_point.double().reshape(scale.shape)
    return ((codes - zeros) * scale).flatten(1)
