"""Which call of classifier-free guidance a model is in now, where its tables have entries of their own for each.

    tables [2 n], n timesteps     entries 0..n-1: calls with the caption,     n..2n-1: calls without it

A pipeline of diffusers says it by ``transformer.cache_context(NAME)``, within which it calls the transformer: ``cond`` and
``uncond`` one after the other, or ``cond_uncond`` for one call of both, the half without captions first. Whatever is there
is read, nothing is counted: a call that nobody names is refused. A step whose second call never comes is refused too, once
the next step's first call has been made: then the sampler is one without guidance, whose calls have other clips.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from qvgen.layers.noise_band import GUIDANCE_CALLS, WITH_CAPTION, NoiseBand

_REMEDY = "sample by a pipeline of diffusers with guidance_scale above 1, or import it with clips=last or clips=mean"


class _NamedCalls:
    """In the place of a model's ``cache_context``: it tells the model's bands the name, and does what the class's own does.

    A class and not a closure, so that a copied model tells its own bands.
    """

    def __init__(self, model: nn.Module, band: NoiseBand) -> None:
        self.model, self.band = model, band
        self._alone: int | None = None  # entry of the last call with captions, while none without them came after it

    @contextmanager
    def __call__(self, name: str, **where: Any) -> Iterator[None]:
        context: Any = type(self.model).cache_context  # type: ignore[attr-defined]
        with context(self.model, name, **where), self.band.calling(name):
            yield
        self._check_order(name)

    def _check_order(self, name: str) -> None:
        if not self.band.sampling:
            return
        entry = self.band.nearest_timestep() if GUIDANCE_CALLS.get(name) == (WITH_CAPTION,) else None
        before, self._alone = self._alone, entry
        if entry is not None and before == entry + 1:
            raise ValueError(
                f"a step of the sampler had no call without a caption, and this model's clips are laid out for two calls a "
                f"step; {_REMEDY}"
            )


def watch_calls(model: nn.Module, band: NoiseBand) -> None:
    """Make a model with guided tables tell its bands which call each is.

    Raises:
        ValueError: The model's class can't be told.
    """
    if not hasattr(type(model), "cache_context"):
        raise ValueError(f"{type(model).__name__} has no cache_context, by which calls of guidance are told apart")
    model.cache_context = _NamedCalls(model, band)  # type: ignore[assignment]
