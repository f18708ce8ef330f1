"""Noise bands: which clip factors belong to a sample, decided by that sample's own timestep.

The timestep axis [0, 1000) is cut into equal bands. The model's forward pre-hook reads the timestep argument of every
call and keeps its bands for the layers below; a layer turns them into one index per row of its input.

Why not the batch's first timestep, or a counter of calls: samples of a batch have different timesteps, and
classifier-free guidance and other step counts change how often a model is called. The same sample must meet the same
factors in training and in every sampler.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

MAX_TIMESTEP = 1000.0


class NoiseBand:
    """The bands of the samples that are passing through a model now; shared by all its quantized layers.

    Args:
        num_bands: Number of equal bands of [0, 1000).
    """

    def __init__(self, num_bands: int) -> None:
        if num_bands < 1:
            raise ValueError(f"num_noise_bands={num_bands} is not positive; the paper uses 50")
        self.num_bands = num_bands
        self.current: Tensor | None = None

    def set_timestep(self, timestep: Tensor) -> None:
        """Keep the bands of a batch.

        Args:
            timestep: [B], or a scalar that all samples share, or [B, tokens] (Wan2.2 TI2V's pipeline); units of
                [0, 1000), any number dtype. A sample with several is in the band of its largest: its other tokens
                are clean conditions.
        """
        if timestep.ndim > 2:
            raise ValueError(f"timestep has shape {list(timestep.shape)}; one number per sample or token is needed")
        if timestep.ndim == 2:
            timestep = timestep.amax(dim=1)
        # The product first, and in double precision: exact for whole timesteps, which may sit on a band's edge.
        share = timestep.detach().reshape(-1).double() * self.num_bands / MAX_TIMESTEP
        self.current = share.long().clamp(0, self.num_bands - 1)

    def row_index(self, x: Tensor) -> Tensor:
        """Band of each entry along the first dimension of a layer's input.

        Args:
            x: [B * n, ..., K], the samples' rows one after another.

        Returns:
            int64 [B * n].

        Raises:
            RuntimeError: No timestep was seen: the layer was called without its model.
            ValueError: The first dimension is no multiple of the number of samples.
        """
        if self.current is None:
            raise RuntimeError("a quantized layer was called before its model: call the transformer with a timestep")
        samples = self.current.numel()
        if x.shape[0] % samples:
            raise ValueError(
                f"a quantized layer got {x.shape[0]} entries along dimension 0 for {samples} samples; "
                "exclude this layer, its input is not ordered by sample"
            )
        return self.current.to(x.device).repeat_interleave(x.shape[0] // samples)


class _ReadTimestep:
    """Forward pre-hook: a class and not a closure, so that a copied model gets a hook on its own bands."""

    def __init__(self, band: NoiseBand, signature: inspect.Signature) -> None:
        self.band = band
        self.signature = signature

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        del module
        timestep = self.signature.bind_partial(*args, **kwargs).arguments.get("timestep")
        if timestep is None:
            raise ValueError("a quantized transformer needs its timestep argument: it chooses the noise band")
        self.band.set_timestep(torch.as_tensor(timestep))


def watch_timestep(model: nn.Module, band: NoiseBand) -> RemovableHandle:
    """Make every call of ``model`` tell ``band`` its timestep, until the handle that is returned is removed.

    Raises:
        ValueError: The model's forward has no argument named ``timestep``.
    """
    signature = inspect.signature(model.forward)
    if "timestep" not in signature.parameters:
        raise ValueError(
            f"{type(model).__name__}.forward has no argument named timestep; it is no diffusion transformer"
        )
    return model.register_forward_pre_hook(_ReadTimestep(band, signature), with_kwargs=True)
