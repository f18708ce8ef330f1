"""Registers the Triton half of fused fake quantization for CUDA and ROCm devices; Triton is imported at the first call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch

from qvgen_kernels.fake_quantize import SCHEMAS, register_implementation
from qvgen_kernels.triton.backend import _card_refusal, _missing

__all__: list[str] = []


@cache
def _function(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(import_module("qvgen_kernels.triton.fake_operators"), name)
    return function


def _call(name: str, *arguments: Any) -> Any:
    return _function(name)(*arguments)


def _refusal() -> str | None:
    """Why Triton can't be used on the present device."""
    return _missing() or _card_refusal(torch.device("cuda", torch.cuda.current_device()))


_NAMES = [schema.split("(")[0] for schema in SCHEMAS]
register_implementation("cuda", {name: partial(_call, name) for name in _NAMES}, refusal=_refusal)
