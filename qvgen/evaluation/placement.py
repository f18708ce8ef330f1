"""Where a model is measured and sampled: on the GPU if there is one, one model at a time, and back where it was.

Several models of billions of parameters are compared at the end of a run; together they would not fit on one GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def sampling_device(default: torch.device | str = "cpu") -> torch.device:
    """The device that samples and measures: the GPU if there is one, else the default."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device(default)


@contextmanager
def placed(model: nn.Module) -> Iterator[torch.device]:
    """Put a model in eval mode on the device that computes, and back when the context ends.

    A model with float32 parameters runs under bfloat16 autocast on a GPU, as it was trained; one in another dtype as it is.

    Yields:
        The device; inputs belong there.
    """
    first = next(value for value in model.parameters() if value.is_floating_point())  # not the codes of a packed layer
    before, was_training = first.device, model.training
    device = sampling_device(before)
    model.eval()
    if device != before:
        model.to(device)
    try:
        with torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=device.type == "cuda" and first.dtype == torch.float32
        ):
            yield device
    finally:
        if device != before:
            model.to(before)
        model.train(was_training)
