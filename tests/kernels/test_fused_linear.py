"""The steps before a packed linear: norm, modulation, type and function, against torch's operators one by one.

The Triton kernels run in Triton's interpreter and are held to the reference with torch.equal. Nothing here ran on a GPU.
"""

import pytest
import torch

from qvgen_kernels import LinearTensors, prepack
from qvgen_kernels.fused_linear import fused_linear
from qvgen_kernels.input_steps import InputSteps, InputTensors
from tests.kernels.layer import DTYPES, make_layer, make_rows
from tests.kernels.triton_interpreter import _quiet_numpy

__all__ = ["_quiet_numpy"]

# Imported after the interpreter's modules, which decide how kernels are made.

ROWS, COLUMNS = 12, 40
NORMS = ["none", "layer", "rms"]


def run(layer, x, kernel, *, before=None, steps=None, **tensors):
    """The outputs of a layer with its steps, by one backend."""
    weight = prepack(layer.planes, scale=layer.scale, zero_point=layer.zero_point, spec=layer.spec, kernel=kernel)
    return fused_linear(
        x,
        weight=weight,
        before=before or InputTensors(),
        steps=steps or InputSteps(),
        tensors=LinearTensors(bias=layer.bias, **tensors),
        spec=layer.spec,
        kernel=kernel,
    )


def modulation(count, columns, dtype, *, row=None):
    generator = torch.Generator().manual_seed(count)
    gain, shift = (torch.randn(count, columns, generator=generator).to(dtype) for _ in range(2))
    return InputTensors(gain=gain + 1, shift=shift, row=row)


def drawn(seed, *, rows=ROWS, columns=COLUMNS):
    """Rows, tensors and steps of any kind: x's type, T, gains of samples, rows or by index, norms with or without weights."""
    kinds = list(DTYPES)
    x = make_rows(rows, columns, seed=seed, dtype=DTYPES[kinds[seed % 3]])
    before, generator = InputTensors(), torch.Generator().manual_seed(seed)
    if seed % 4:
        count = (1, 3, rows, 5)[seed % 4]
        row = (
            torch.randint(0, count, (rows,), generator=generator, dtype=torch.int32)
            if count == 5 or seed % 5 == 0
            else None
        )
        before = modulation(count, columns, (torch.float32, x.dtype)[seed % 2], row=row)
    norm = NORMS[seed % 3]
    if norm != "none" and seed % 2:
        weight, bias = (
            torch.randn(columns, generator=generator).to((x.dtype, torch.float32)[seed % 4 == 1]) for _ in "ab"
        )
        before = before._replace(norm_weight=weight, norm_bias=bias)
    steps = InputSteps(norm=norm, eps=1e-6, function="none", dtype=("", *kinds)[seed // 3 % 4])
    return x, before, steps


@pytest.mark.parametrize("seed", range(24))
def test_the_triton_kernel_computes_the_steps_of_the_reference(seed):
    options = {"activation_bits": (4, 8, 3)[seed % 3], "activation_zero_point": ("integer", "none")[seed % 2]}
    if seed % 6 == 3:  # elementwise steps with groups, which a program does not hold whole
        options |= {"weight_group_size": 8} if seed % 4 == 1 else {"activation_group_size": 8}
    layer = make_layer(in_features=COLUMNS, out_features=17, weight_bits=4, seed=seed, **options)
    x, before, steps = drawn(seed)
    clips = LinearTensors(clip_high=torch.rand(ROWS) * 0.5 + 0.5)
    tensors = {"clip_high": clips.clip_high, "input_scale": torch.linspace(0.5, 2, COLUMNS) if seed % 4 == 2 else None}
    expected = run(layer, x, "reference", before=before, steps=steps, **tensors)
    found = run(layer, x, "triton", before=before, steps=steps, **tensors)
    assert found.dtype == expected.dtype == steps.output_dtype(x)
    assert torch.equal(found, expected)
    assert found.isfinite().all()
