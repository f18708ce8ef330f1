"""Noise bands: which clip factors belong to a sample, decided by that sample's own timestep.

The timestep axis [0, 1000) is cut into equal bands. The model's forward pre-hook reads the timestep argument of every
call and keeps its bands for the layers below; a layer turns them into one index per row of its input.

Why not the batch's first timestep, or a counter of calls: samples of a batch have different timesteps, and
classifier-free guidance and other step counts change how often a model is called. The same sample must meet the same
factors in training and in every sampler.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qvgen.quant.precision import to_float64

MAX_TIMESTEP = 1000.0
TIMESTEP_TOLERANCE = 0.01
"""Timesteps that differ by less are the same step of a sampler: schedulers compute them in float32."""

WITH_CAPTION, WITHOUT_CAPTION = 0, 1
GUIDANCE_CALLS: Mapping[str, tuple[int, ...]] = {
    "cond": (WITH_CAPTION,),
    "uncond": (WITHOUT_CAPTION,),
    "pred_cond": (WITH_CAPTION,),
    "pred_uncond": (WITHOUT_CAPTION,),
    "cond_uncond": (WITHOUT_CAPTION, WITH_CAPTION),
}
"""Calls of guidance by the names that diffusers' pipelines give them: the part of the tables of each part of the batch."""


class NoiseBand:
    """Where the samples that are passing through a model now stand on the noise axis; shared by all its quantized layers.

    Args:
        num_bands: Number of equal bands of [0, 1000).

    Attributes:
        timesteps: Tables have an entry for each of these steps of a sampler (rising), and a sample is in the band of the
            nearest one: static tables, a few-step model, and clips of a checkpoint that was imported. None: equal bands.
        guided: The tables have two entries for each of ``timesteps``: first those of calls with captions, rising, then those
            of guidance's calls without them (:mod:`qvgen.layers.guidance_call`).
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
        self.guided = False
        self.strict = False
        self.sampling = True
        self.policy_bits: tuple[int, ...] | None = None
        self.current: Tensor | None = None
        self.timestep: Tensor | None = None
        self._between: tuple[Tensor, Tensor, Tensor] | None = None
        self._listed: list[int] | None = None
        self._call: str | None = None

    def use_timesteps_(self, timesteps: Sequence[float], *, guided: bool = False) -> None:
        """Have one band for each of these timesteps of a sampler, in [0, 1000], rising; two where they are ``guided``.

        Raises:
            ValueError: They are not rising, or other ones were chosen before.
        """
        values = tuple(float(t) for t in timesteps)
        if self.timesteps is not None and self.timesteps != values:
            raise ValueError(
                f"tables of the steps {list(self.timesteps)} are there, and {list(values)} are other ones; all layers need "
                "the same steps"
            )
        if not values or list(values) != sorted(set(values)) or not all(0 <= t <= MAX_TIMESTEP for t in values):
            raise ValueError(f"timesteps of tables must rise within 0..{MAX_TIMESTEP:g}; got {values}")
        self.timesteps, self.guided, self.num_bands = values, guided, len(values) * (2 if guided else 1)

    @contextmanager
    def calling(self, name: str) -> Iterator[None]:
        """Say which call of guidance the model is in within the context, by the name that diffusers has for it."""
        before, self._call = self._call, name
        try:
            yield
        finally:
            self._call = before

    def set_timestep(self, timestep: Tensor, *, training: bool = False) -> None:
        """Keep the bands of a batch.

        Args:
            timestep: [B], or a scalar that all samples share, or [B, tokens] (Wan2.2 TI2V's pipeline); units of
                [0, 1000), any number dtype. A sample with several is in the band of its largest, with all of its
                tokens: the others are a clean condition, whose timestep of 0 is no noise level of the sample's.
            training: Any timestep may come, strict or not.

        Raises:
            ValueError: Its shape is another one, it is not among ``timesteps`` and the bands are strict, or the tables are
                guided and nothing says which call of guidance this is.
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
        first = self._first_entries(values.numel(), training=training) if self.guided else 0
        if isinstance(first, Tensor):
            first, values = first.to(values.device), values.expand(len(first))
        steps = torch.tensor(self.timesteps, dtype=values.dtype, device="cpu").to(values.device)
        upper = torch.searchsorted(steps, values).clamp(max=len(steps) - 1)
        lower = (upper - 1).clamp(min=0)
        span = (steps[upper] - steps[lower]).clamp(min=1e-12)
        share = ((values - steps[lower]) / span).clamp(0, 1)
        # An exact hit takes its entry alone: 1 * s + 0 * s' is s, bit for bit.
        current = torch.where(share < 0.5, lower, upper)
        self.current = (current + first).to(timestep.device)
        between = (lower + first, upper + first, share.float())
        self._between = tuple(value.to(timestep.device) for value in between)  # type: ignore[assignment]
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

    def _first_entries(self, samples: int, *, training: bool) -> Tensor:
        """Entry of guided tables at which each sample's part begins, int64 [B]; [2] where two halves have one timestep.

        Held-out errors and training draw any timestep, with a caption: they are calls with one.
        """
        named = GUIDANCE_CALLS.get(self._call or "")
        parts = named if self.sampling and not training else (WITH_CAPTION,)
        if parts is None:
            within = f"cache_context({self._call!r})" if self._call else "no cache_context"
            raise ValueError(
                f"the model was called within {within}, and its clips differ between guidance's calls; call it within "
                "transformer.cache_context('cond'), 'uncond' or 'cond_uncond' (the half without captions first), as "
                "diffusers' pipelines do"
            )
        count = max(samples, len(parts))
        if count % len(parts):
            raise ValueError(f"a call of both halves of guidance has {count} samples, which are no two halves")
        assert self.timesteps is not None, "the tables are by timestep"
        return (torch.tensor(parts, device="cpu") * len(self.timesteps)).repeat_interleave(count // len(parts))

    def nearest_timestep(self) -> int | None:
        """Index of the entry of ``timesteps`` that is nearest to the batch's largest timestep; None before the first call."""
        if self.timestep is None or self.timesteps is None:
            return None
        largest = float(self.timestep.max())
        return min(range(len(self.timesteps)), key=lambda index: abs(self.timesteps[index] - largest))

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
        """A table's entry for each entry along the first dimension of x, interpolated between steps; float32 [B * n, ...]."""
        if self._between is None:
            return table[self.row_index(x)]
        lower, upper, share = (self._repeat(value, x) for value in self._between)
        share = share.reshape(-1, *[1] * (table.ndim - 1))
        return table[lower] * (1.0 - share) + table[upper] * share

    def _repeat(self, values: Tensor, x: Tensor) -> Tensor:
        samples = values.numel()
        if x.shape[0] % samples:
            raise ValueError(
                f"a quantized layer got {x.shape[0]} entries along dimension 0 for {samples} samples; "
                "exclude this layer, its input is not ordered by sample"
            )
        values = values.to(x.device)
        return values if x.shape[0] == samples else values.repeat_interleave(x.shape[0] // samples)

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


def step_bands(num_bands: int, timesteps: Sequence[float] | None) -> NoiseBand:
    """Make the bands of a model: one for each of a few-step model's timesteps, in any order, or so many equal ones."""
    band = NoiseBand(num_bands)
    if timesteps is not None:
        band.use_timesteps_(sorted(timesteps))
    return band


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
