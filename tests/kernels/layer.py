"""A random packed layer and its numpy twin, for the tests of this folder."""

from dataclasses import dataclass, fields

import numpy as np
import torch

from qvgen.quant.packing import pack_codes
from qvgen_kernels import LinearSpec, LinearTensors, packed_linear, prepack
from tests.kernels import oracle

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Layer:
    """Canonical tensors of one layer, and what the reference backend prepacked."""

    spec: LinearSpec
    codes: torch.Tensor
    planes: tuple[torch.Tensor, ...]
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    bias: torch.Tensor
    weight: list[torch.Tensor]

    def __call__(self, x, *, clips=(None, None), **tensors):
        given = LinearTensors(bias=self.bias, clip_low=clips[0], clip_high=clips[1], **tensors)
        return packed_linear(x, weight=self.weight, tensors=given, spec=self.spec, kernel="reference")

    def oracle(self, x, *, clips=(None, None)):
        """oracle.packed_linear on x [M, K]."""
        zero = self.zero_point
        if zero is None:
            zero = torch.full_like(self.scale, 2.0 ** (self.spec.weight_bits - 1))
        ones = torch.ones(len(x))
        return oracle.packed_linear(
            as64(x),
            codes=self.codes.numpy().astype(np.int64),
            scale=as64(self.scale).reshape(len(self.scale), -1),
            zero_point=as64(zero).reshape(len(zero), -1),
            bias=as64(self.bias),
            clip_low=as64(ones if clips[0] is None else clips[0]),
            clip_high=as64(ones if clips[1] is None else clips[1]),
            spec={f.name: getattr(self.spec, f.name) for f in fields(self.spec) if f.init},
        )


def as64(tensor):
    return tensor.to(torch.float64).numpy()


def make_layer(*, seed=0, **options):
    """Layer with random codes, scales, zero points and bias; options are LinearSpec's fields."""
    options = {"in_features": 24, "out_features": 7, "weight_bits": 3, "activation_bits": 3} | options
    spec = LinearSpec(**options)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(
        0, 2**spec.weight_bits, (spec.out_features, spec.in_features), generator=generator, dtype=torch.uint8
    )
    shape = (spec.out_features, *((spec.num_weight_groups,) if spec.weight_group_size else ()))
    scale = torch.rand(shape, generator=generator) * 0.1 + 1e-3
    zero_point = None
    if spec.weight_zero_point == "integer":
        zero_point = torch.randint(0, 2**spec.weight_bits, shape, generator=generator, dtype=torch.uint8)
    elif spec.weight_zero_point == "real":
        zero_point = torch.rand(shape, generator=generator) * (2**spec.weight_bits - 1)
    bias = torch.randn(spec.out_features, generator=generator)
    planes = pack_codes(codes, bits=spec.weight_bits)
    weight = prepack(planes, scale=scale, zero_point=zero_point, spec=spec, kernel="reference")
    return Layer(spec, codes, planes, scale, zero_point, bias, weight)


def make_rows(rows, columns, *, seed=0, dtype=torch.float32):
    """Rows of very different sizes and signs, with outliers: [rows, columns]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    size = 10.0 ** torch.linspace(-3, 3, rows)[torch.randperm(rows, generator=generator)]
    return (x * size[:, None] * (1 + 20 * (torch.rand(rows, columns, generator=generator) > 0.95))).to(dtype)
