"""Compile for Hopper what calls of a backend launch, in a process without a GPU: a stand-in for the driver, no launch.

It holds what the interpreter does not see: that Triton's own compiler takes the arguments of a call as they are. Writes a
line a kernel.
"""

import sys
from functools import partial
from typing import get_args

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from qvgen_kernels import LinearTensors, get_backend
from qvgen_kernels.attention import AttentionSpec, AttentionTensors
from qvgen_kernels.attention.contract import AttentionKind
from qvgen_kernels.attention.gradient import attention_gradients
from qvgen_kernels.attention.triton import attend, gradient
from qvgen_kernels.attention.triton import quantize as attention_quantize
from qvgen_kernels.attention.triton.backend import triton_attention, triton_products
from qvgen_kernels.fake_quantize import RowSpec
from qvgen_kernels.gluon import gemm as gluon_gemm
from qvgen_kernels.input_steps import InputSteps, InputTensors
from qvgen_kernels.triton import fake_operators, function_choice, gemm, launch, quantize, rotate
from tests.kernels.layer import make_layer, make_rows

CASES = (
    {"in_features": 256, "out_features": 250, "weight_bits": 2, "weight_group_size": 32, "activation_bits": 8},
    {
        "in_features": 120,
        "out_features": 64,
        "weight_bits": 3,
        "activation_bits": 8,
        "rotation": 120,
        "weight_zero_point": "real",
        "function": "gelu_tanh",
        "branch_rank": 4,
    },
    {
        "in_features": 128,
        "out_features": 64,
        "weight_bits": 8,
        "activation_bits": 4,
        "rotation": 64,
        "rotation_kind": "regular",
        "activation_range": "static",
    },
)

GLUON_CASES = ({"in_features": 250, "out_features": 120, "weight_bits": 3, "activation_bits": 8, "branch_rank": 4},)


class Driver:
    """The answers that compiling takes from a driver."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def compile_only(kernel, grid, *arguments, on, **options):
    """Compile the kernel for exactly these arguments."""
    made = kernel.warmup(*arguments, grid=grid, **options, **launch.OPTIONS)
    sys.stdout.write(f"{kernel.__name__} {made.metadata.num_warps} {made.metadata.shared}\n")


def main():
    driver.set_active(Driver())
    attentions = (attention_quantize, attend, gradient)
    for module in (fake_operators, function_choice, gemm, quantize, rotate, gluon_gemm, *attentions):
        module.launch = compile_only
    name = sys.argv[1] if len(sys.argv) > 1 else "triton"
    backend = get_backend(name)
    for options in CASES if name == "triton" else GLUON_CASES:
        layer = make_layer(**options)
        spec, x = layer.spec, make_rows(6, layer.spec.in_features, dtype=torch.bfloat16)
        rank, static = spec.branch_rank, spec.activation_range == "static"
        tail = spec.function != "none"
        tensors = LinearTensors(
            bias=layer.bias,
            clip_high=None if static else torch.ones(6),
            input_scale=torch.ones(spec.in_features),
            row_scale=torch.ones(6) if static else None,
            row_zero_point=torch.zeros(6) if static else None,
            branch_down=torch.ones(rank, spec.in_features) if rank else None,
            branch_up=torch.ones(spec.out_features, rank) if rank else None,
            gate=torch.ones(2, spec.out_features) if tail else None,
            residual=torch.ones(6, spec.out_features, dtype=torch.bfloat16) if tail else None,
        )
        weight = backend.prepack(layer.planes, scale=layer.scale, zero_point=layer.zero_point, spec=spec)
        backend.linear(x, weight, tensors=tensors, spec=spec)
    if name == "triton":
        steps_too(backend)
        call_fake_quantization()
        call_attention()


def call_attention():
    """One query of one head, whose sizes are constants of the compiled code, and a mask that all queries share."""
    q, k = torch.ones(1, 1, 1, 72, dtype=torch.float16), torch.ones(1, 1, 70, 72, dtype=torch.float16)
    clips = AttentionTensors(query_clip=torch.ones(1), key_clip=torch.ones(1))
    mask = torch.ones(1, 1, 1, 70, dtype=torch.bool)
    for kind in get_args(AttentionKind):
        triton_attention(q, k, k, mask=mask, tensors=clips, spec=AttentionSpec(72, kind=kind))
    inputs, spec = (q, k, k), AttentionSpec(72)
    products = partial(triton_products, inputs=inputs, mask=mask, tensors=clips, spec=spec)
    attention_gradients(q, inputs, tensors=clips, spec=spec, products=products)


def steps_too(backend):
    """A layer with steps before it, of some rows of two samples: a norm and a gain by row; and a function."""
    layer = make_layer(in_features=256, out_features=64, weight_bits=4, activation_bits=4)
    weight = backend.prepack(layer.planes, scale=layer.scale, zero_point=layer.zero_point, spec=layer.spec)
    x = make_rows(8, 256).view(2, 4, 256)[:, 1:]
    modulation = InputTensors(
        gain=torch.ones(2, 256), shift=torch.ones(2, 256), row=torch.tensor([0, 0, 1, 0, 0, 1], dtype=torch.int32)
    )
    for before, steps in (
        (modulation, InputSteps(norm="layer", eps=1e-6, dtype="bfloat16")),
        (InputTensors(), InputSteps(function="gelu_tanh", dtype="bfloat16")),
    ):
        backend.fused_linear(x, weight, before=before, steps=steps, tensors=LinearTensors(), spec=layer.spec)


def call_fake_quantization():
    """All five operators, for an input in bfloat16 and for a weight in groups with a helper."""
    x, clips = make_rows(6, 1100, dtype=torch.bfloat16), [torch.ones(6, 1)] * 2
    text = RowSpec(kind="dynamic", qmin=0, qmax=15, zero_point="integer", group=1100).to_string()
    *_, low, high, _ = fake_operators.quantize_rows(x, clips, None, text, torch.bfloat16)
    fake_operators.quantize_rows_backward(torch.ones(6, 1100), x, clips, (low, high), text, torch.bfloat16)
    fake_operators.row_scales((low, high), clips, text)
    weight, params = make_rows(6, 120), [torch.ones(6, 2)] * 2
    text = RowSpec(kind="learned", qmin=0, qmax=7, zero_point="real", group=60, raw=True, row_sums=True).to_string()
    fake_operators.quantize_rows(weight, params, weight, text, torch.float32)
    fake_operators.quantize_rows_backward(torch.ones(6, 120), weight, params, (), text, None)
    column = torch.ones(120)
    fake_operators.scale_output(weight.clone(), clips[0], column, column[:6], column, weight, column)
    fake_operators.scale_gradient(weight, clips[0], column, torch.bfloat16)


if __name__ == "__main__":
    main()
