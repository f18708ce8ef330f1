"""Noise bands: which clip factors belong to a sample, decided by that sample's own timestep.

The timestep axis [0, 1000) is cut into equal bands. The model's forward pre-hook reads the timestep argument of every
call and keeps its bands for the layers below; a layer turns them into one index per row of its input.

Why not the batch's first timestep, or a counter of calls: samples of a batch have different timesteps, and
classifier-free guidance and other step counts change how often a model is called. The same sample must meet the same
factors in training and in every sampler.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qvgen.quant.precision import to_float64

MAX_TIMESTEP = 1000.0
TIMESTEP_TOLERANCE = 0.01
"""Timesteps that differ by less are the same step of a sampler: schedulers compute them in float32."""


class NoiseBand:
    """Where the samples that are passing through a model now stand on the noise axis; shared by all its quantized layers.

    Args:
        num_bands: Number of equal bands of [0, 1000).

    Attributes:
        timesteps: Tables have an entry for each of these steps of a sampler (rising), and a sample is in the band of the
            nearest one: static tables, and clips of a checkpoint that was imported. None: equal bands.
        strict: Refuse timesteps that are not among ``timesteps`` when the model samples, in place of interpolating.
        sampling: Calls are steps of a sampler; False while held-out errors are measured, which draw any timestep: tables
            interpolate then, whatever ``strict`` says, and no policy acts.
        timestep: float64 [B], the samples' timesteps now (on the CPU where the device has no float64); None before the
            first call.
        policy_bits: Activation width that a sampling policy asks for now, for each sample; None: there is no policy.
    """

    def __init__(self, num_bands: int) -> None:
        if num_bands < 1:
            raise ValueError(f"num_noise_bands={num_bands} is not positive; the paper uses 50")
        self.num_bands = num_bands
        self.timesteps: tuple[float, ...] | None = None
        self.strict = False
        self.sampling = True
        self.policy_bits: tuple[int, ...] | None = None
        self.current: Tensor | None = None
        self.timestep: Tensor | None = None
        self._upper: tuple[Tensor, Tensor] | None = None
        self._listed: list[int] | None = None

    def use_timesteps_(self, timesteps: Sequence[float]) -> None:
        """Have one band for each of these timesteps of a sampler, in [0, 1000], rising.

        Raises:
            ValueError: They are not rising, or other ones were chosen before.
        """
        values = tuple(float(t) for t in timesteps)
        if self.timesteps is not None and self.timesteps != values:
            raise ValueError(f"static tables of {len(self.timesteps)} steps are there; all layers need the same steps")
        if not values or list(values) != sorted(set(values)) or not all(0 <= t <= MAX_TIMESTEP for t in values):
            raise ValueError(f"timesteps of static tables must rise within 0..{MAX_TIMESTEP:g}; got {values}")
        self.timesteps, self.num_bands = values, len(values)

    def set_timestep(self, timestep: Tensor, *, training: bool = False) -> None:
        """Keep the bands of a batch.

        Args:
            timestep: [B], or a scalar that all samples share, or [B, tokens] (Wan2.2 TI2V's pipeline); units of
                [0, 1000), any number dtype. A sample with several is in the band of its largest: its other tokens
                are clean conditions.
            training: Any timestep may come, strict or not.

        Raises:
            ValueError: Its shape is another one, or it is not among ``timesteps`` and the bands are strict.
        """
        if timestep.ndim > 2:
            raise ValueError(f"timestep has shape {list(timestep.shape)}; one number per sample or token is needed")
        if timestep.ndim == 2:
            timestep = timestep.amax(dim=1)
        self._listed = None
        values = self.timestep = to_float64(timestep.detach().reshape(-1))
        if self.timesteps is None:
            # The product first, and in double precision: exact for whole timesteps, which may sit on a band's edge.
            share = values * self.num_bands / MAX_TIMESTEP
            self.current = share.long().clamp(0, self.num_bands - 1).to(timestep.device)
            return
        steps = torch.tensor(self.timesteps, dtype=values.dtype, device="cpu").to(values.device)
        upper = torch.searchsorted(steps, values).clamp(max=len(steps) - 1)
        lower = (upper - 1).clamp(min=0)
        span = (steps[upper] - steps[lower]).clamp(min=1e-12)
        share = ((values - steps[lower]) / span).clamp(0, 1)
        # An exact hit takes its entry alone: 1 * s + 0 * s' is s, bit for bit.
        current = torch.where(share < 0.5, lower, upper)
        self.current = current.to(timestep.device)
        self._upper = (lower.to(timestep.device), share.float().to(timestep.device))
        if (
            self.strict
            and self.sampling
            and not training
            and bool(((steps[current] - values).abs() > TIMESTEP_TOLERANCE).any())
        ):
            raise ValueError(
                f"timestep {values.tolist()} is not among the {len(steps)} that the static scales were calibrated for, or an "
                "import laid its clips out for; sample with the same scheduler and number of steps, calibrate with "
                "init.other_steps=interpolate, or import with clips=mean"
            )

    def sample_bands(self) -> list[int]:
        """Band of each sample as plain numbers; on a GPU the first call after a new timestep waits for it."""
        if self._listed is None:
            self._listed = self._samples().tolist()
        return self._listed

    def _samples(self) -> Tensor:
        if self.current is None:
            raise RuntimeError("a quantized layer was called before its model: call the transformer with a timestep")
        return self.current

    def row_values(self, table: Tensor, x: Tensor) -> Tensor:
        """A table's entry for each entry along the first dimension of x, interpolated between steps; float32 [B * n]."""
        if self._upper is None:
            return table[self.row_index(x)]
        lower, share = (self._repeat(value, x) for value in self._upper)
        upper = (lower + 1).clamp(max=self.num_bands - 1)
        return table[lower] * (1.0 - share) + table[upper] * share

    def _repeat(self, values: Tensor, x: Tensor) -> Tensor:
        samples = values.numel()
        if x.shape[0] % samples:
            raise ValueError(
                f"a quantized layer got {x.shape[0]} entries along dimension 0 for {samples} samples; "
                "exclude this layer, its input is not ordered by sample"
            )
        return values.to(x.device).repeat_interleave(x.shape[0] // samples)

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
        return self._repeat(self._samples(), x)


class _ReadTimestep:
    """Forward pre-hook: a class and not a closure, so that a copied model gets a hook on its own bands."""

    def __init__(self, band: NoiseBand, signature: inspect.Signature) -> None:
        self.band = band
        self.signature = signature

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        timestep = self.signature.bind_partial(*args, **kwargs).arguments.get("timestep")
        if timestep is None:
            raise ValueError("a quantized transformer needs its timestep argument: it chooses the noise band")
        self.band.set_timestep(torch.as_tensor(timestep), training=module.training)


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
