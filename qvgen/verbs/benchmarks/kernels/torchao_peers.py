"""torchao's linears as peers of ``benchmark kernels``; bfloat16 in and out, as the packed ones.

Where the processor has no bfloat16 they get float32: a call of oneDNN's int8 linear with bfloat16 outputs took more than ten
minutes there (1024 x 1920 -> 1920, AVX2).

torchao 0.18 has four ways to a linear with 8-bit activations on a CPU:

- ``Int8DynamicActivationInt8WeightConfig``: symmetric scales for each token and output channel, torch._int_mm. Eager it makes
  several passes over float32, and is left out without VNNI, where it took 30 times F.linear's time; compiled with freezing,
  inductor packs the weight and fuses the scales. Without VNNI that product may saturate: a feed-forward of 160-96-64 had an
  error of 9 % (1.4 % eager).
- ``Int8DynamicActivationIntxWeightConfig`` with int4 weights, groups of 32: its wheel has no kernel for them on x86, the
  weights are dequantized for a product in floating point.
- Export, ``X86InductorQuantizer`` (dynamic) and compilation with freezing, which calls oneDNN's fused int8 linear. It has one
  scale for all tokens, so it is coarser than the packed linear. Without VNNI its product saturates too (an error of 3 %).
  ``lower_pt2e_quantized_to_x86``, which lowers without compiling, was slower: 1.5 times in float32, 2.9 times in bfloat16
  (1024 x 1920 -> 1920, AVX-512 VNNI).
- ``torchao.prototype``'s ``Int8DynamicActivationInt4WeightConfig`` asserts an operator (da8w4_linear_cpu) that its wheel does
  not have; left out.

Source: the package's own docstrings and https://docs.pytorch.org/ao, the tutorial of the X86 backend.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qvgen.evaluation.environment import fast_bfloat16
from qvgen.verbs.benchmarks.kernels.timing import Candidates

MODULES = ("torchao", "torchao.quantization.pt2e.quantize_pt2e")
"""What is imported here; the first one knows its version."""
GROUP = 32
"""Weights with one scale: torchao's default."""


def torchao_candidates(x: Tensor, weights: Sequence[Tensor], threads: int) -> Candidates:
    """All of torchao's ways to this linear, or to this feed-forward with GELU (tanh), compiled for so many threads.

    Args:
        x: bf16 [rows, in_features]; read as float32 where the processor has no bfloat16.
        weights: bf16 [out_features, in_features] of each layer, one or two.
        threads: inductor writes their number into its code.

    Raises:
        ImportError: torchao is not installed, or not one that has these configurations.
    """
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        PerGroup,
        quantize_,
    )

    dtype, kind = (torch.bfloat16, "bf16") if fast_bfloat16() else (torch.float32, "float32")
    x, weights = x.to(dtype), [weight.to(dtype) for weight in weights]
    eight, four = _module(weights), _module(weights)
    torch.set_num_threads(threads)
    candidates: Candidates = {}
    # inductor warns of its own tensor copies, export of its own pytree nodes
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        quantize_(eight, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
        if torch.cpu._is_vnni_supported():
            candidates[f"torchao W8A8 per token ({kind}), eager"] = lambda: eight(x)
        candidates[f"torchao W8A8 per token ({kind}), compiled"] = _compiled(eight, x)
        candidates[f"torchao W8A8 per tensor ({kind}), X86InductorQuantizer"] = _exported(weights, x)
        if all(weight.shape[1] % GROUP == 0 for weight in weights):
            config = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(GROUP))
            quantize_(four, config)
            candidates[f"torchao W4A8 groups of {GROUP} ({kind}), compiled"] = _compiled(four, x)
    return candidates


def _module(weights: Sequence[Tensor]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for weight in weights:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        layers += [nn.GELU(approximate="tanh"), linear] if layers else [linear]
    return nn.Sequential(*layers).eval()


def _compiled(module: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """Compile for inputs like x and call once; torch.no_grad() has to hold then and later, freezing asks for it."""
    from torch._inductor import config

    fast = torch.compile(module, fullgraph=True, dynamic=False)
    with config.patch(freezing=True):
        fast(x)
    return lambda: fast(x)


def _exported(weights: Sequence[Tensor], x: Tensor) -> Callable[[], Tensor]:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    wide: Any = torch.export.export(_module([weight.float() for weight in weights]), (x.float(),)).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_dynamic=True))
    prepared = prepare_pt2e(wide, quantizer)
    prepared(x.float())
    converted = convert_pt2e(prepared)

    def narrow() -> torch.autocast:
        """Around the product, whose operands are codes: it sets the output's type."""
        return torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16)

    with narrow():
        call = _compiled(converted, x)

    def run() -> Tensor:
        with narrow():
            return call()

    return run
