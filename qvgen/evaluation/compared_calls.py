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
from qvgen.models.base import predicted_part

Recorded = tuple[tuple[Any, ...], dict[str, Any], Tensor]
"""Arguments of a call, by position and by name, and the output; tensors on the CPU."""


@torch.no_grad()
def compared_calls(
    reference: nn.Module, model: nn.Module, sample: Callable[[], object], *, family: object
) -> list[ComparedCall]:
    """Record the reference's calls and answer each by the other model; one model at a time is where models compute.

    Args:
        reference: The full-precision transformer.
        model: The quantized one.
        sample: Samples one video with the reference.
        family: Says which part of an output counts (:func:`qvgen.models.base.predicted_part`).
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
            compared.append(
                ComparedCall(
                    timestep=_timestep(signature.bind(*arguments, **named).arguments["timestep"]),
                    output=predicted_part(family, on_cpu(answer)),
                    reference=predicted_part(family, output),
                )
            )
    return compared


def _timestep(given: Any) -> float:
    """The timestep of a call: the samples' mean; a sample's largest where tokens have their own, as an image's have 0."""
    timesteps = torch.as_tensor(given).double()
    return float(timesteps.amax(dim=1).mean() if timesteps.ndim == 2 else timesteps.mean())
