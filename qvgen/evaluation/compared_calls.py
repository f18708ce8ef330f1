"""The calls that a reference model makes while it samples a video, and another model's answers to the very same inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qvgen.evaluation.metrics.base import ComparedCall
from qvgen.evaluation.placement import placed
from qvgen.evaluation.sampled_inputs import mapped, on_cpu

Recorded = tuple[tuple[Any, ...], dict[str, Any], Tensor]
"""Arguments of a call, by position and by name, and the output; tensors on the CPU."""


@torch.no_grad()
def compared_calls(reference: nn.Module, model: nn.Module, sample: Callable[[], object]) -> list[ComparedCall]:
    """Record the reference's calls and answer each by the other model; one model at a time is where models compute.

    Args:
        reference: The full-precision transformer.
        model: The quantized one.
        sample: Samples one video with the reference.
    """
    calls: list[Recorded] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        del module
        calls.append((mapped(arguments, on_cpu), mapped(named, on_cpu), on_cpu(output[0])))

    handle = reference.register_forward_hook(keep, with_kwargs=True)
    try:
        with placed(reference):
            sample()
    finally:
        handle.remove()
    signature, dtype = inspect.signature(reference.forward), reference.dtype
    compared = []
    with placed(model) as device:

        def to_model(value: Tensor) -> Tensor:
            return value.to(device, model.dtype if value.dtype == dtype else value.dtype)

        for arguments, named, output in calls:
            answer = model(*mapped(arguments, to_model), **mapped(named, to_model))[0]
            timestep = signature.bind(*arguments, **named).arguments["timestep"]
            compared.append(
                ComparedCall(
                    timestep=float(torch.as_tensor(timestep).double().mean()), output=on_cpu(answer), reference=output
                )
            )
    return compared
