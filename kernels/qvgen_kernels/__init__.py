"""Integer kernels of qvgen's packed linear: the contract, an exact reference, backends behind one operator.

The contract is kernels/README.md. This package depends on torch alone and can be used without qvgen:

    kernel = resolve_kernel("auto", spec, device=device).name
    weight = prepack(planes, scale=scale, zero_point=zero_point, spec=spec, kernel=kernel)
    y = packed_linear(x, weight=weight, tensors=LinearTensors(bias=bias), spec=spec, kernel=kernel)

Every module of the package is imported here, and a backend's module registers its backend: a new one is one file.
Another package brings one by an entry point (registry.py).
"""

from importlib import import_module
from pkgutil import iter_modules

from qvgen_kernels.contract import LinearSpec, LinearTensors
from qvgen_kernels.fused_op import fused_linear
from qvgen_kernels.input_steps import InputSteps, InputTensors
from qvgen_kernels.op import packed_linear, prepack
from qvgen_kernels.registry import (
    Backend,
    available_kernels,
    describe_choice,
    get_backend,
    kernel_names,
    refusals,
    register_backend,
    resolve_kernel,
)

__all__ = [
    "Backend",
    "InputSteps",
    "InputTensors",
    "LinearSpec",
    "LinearTensors",
    "available_kernels",
    "describe_choice",
    "fused_linear",
    "get_backend",
    "kernel_names",
    "packed_linear",
    "prepack",
    "refusals",
    "register_backend",
    "resolve_kernel",
]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
