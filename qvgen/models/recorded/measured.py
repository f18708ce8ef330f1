"""Facts that a recorded call of a pipeline shows: where its latents' dimensions are, how they are normalized, how it calls.

A sample here is [B, C, F, H, W] in the order of the VAE, as everywhere in qvgen; an image has F = 1.

    sample of the scheduler  --order--> VAE's latents [B, C, F, H, W], or [B, C, H, W]
    input of the transformer            a multiple of the sample, its dimensions in any order, further channels behind
    output of the transformer           of the same order; its first C channels are what the scheduler is given
    VAE's latents                       scale x sample + shift, for each channel

All of it is compared with the recorded numbers. What does not agree is refused: nothing here is guessed from names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Self

import torch
from torch import Tensor

from qvgen.models.recorded.outline import Recording

_TIMESTEPS = ("timestep", "timesteps", "t")


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """Facts of a pipeline.

    Attributes:
        shape: (C, F, H, W) of the latents of the size that was recorded.
        is_image: The pipeline's latents have no dimension of frames.
        hidden: Name of the transformer's argument that the noisy latents are given as.
        timestep: Name of the one that the timestep is given as.
        order: The transformer's dimensions -> those of the VAE's latents.
        scale: float32 [C].
        shift: float32 [C].
        mu: Argument ``mu`` of ``set_timesteps``; None without.
    """

    shape: tuple[int, int, int, int]
    is_image: bool
    hidden: str
    timestep: str
    order: tuple[int, ...]
    scale: Tensor
    shift: Tensor
    mu: float | None

    @classmethod
    def of(cls, recording: Recording) -> Self:
        """Read the facts off a recording of two steps up to the VAE, of one sample without guidance.

        Raises:
            ValueError: They are not those of a supported pipeline; the message is a clause that follows on its name.
        """
        if len(recording.calls) != len(recording.steps) or not recording.calls:
            raise ValueError(
                f"calls its transformer {len(recording.calls)} times in {len(recording.steps)} steps without guidance"
            )
        call, (prediction, timestep, sample) = recording.calls[0], recording.steps[0]
        assert recording.decoded is not None  # a recording up to the VAE has it
        assert recording.stepped is not None
        hidden = next(iter(call))
        _check_timestep(call, timestep)
        to_vae, scale, shift = _normalization(recording.stepped, recording.decoded)
        latents = sample.permute(to_vae)
        order = _order(latents, call[hidden])
        measured = cls(
            shape=_video_shape(latents),
            is_image=latents.ndim == 4,
            hidden=hidden,
            timestep=next(name for name in _TIMESTEPS if name in call),
            order=order,
            scale=scale,
            shift=shift,
            mu=recording.mu,
        )
        if not torch.equal(measured._first_channels(recording.outputs[0]), prediction.permute(to_vae)):
            raise ValueError("gives its scheduler something else than its transformer's output")
        return measured

    def call(self, recorded: Mapping[str, Any], noisy: Tensor, timestep: Tensor) -> dict[str, Any]:
        """The arguments of the transformer for noisy latents [B, C, F, H, W] at timesteps [B], from a recorded call."""
        given: Tensor = recorded[self.hidden]
        latents = (noisy[:, :, 0] if self.is_image else noisy).to(given.dtype)
        whole = given.permute(self.order)  # with further channels, which are conditions
        whole = torch.cat([latents, whole[:, latents.shape[1] :]], dim=1)
        ordered = whole.permute(*_inverse(self.order))
        return {**recorded, self.hidden: ordered, self.timestep: timestep, "return_dict": False}

    def prediction(self, output: Tensor) -> Tensor:
        """The transformer's output as a prediction [B, C, F, H, W]."""
        found = self._first_channels(output)
        return found.unsqueeze(2) if self.is_image else found

    def _first_channels(self, output: Tensor) -> Tensor:
        return output.permute(self.order)[:, : self.shape[0]]

    def normalize(self, latents: Tensor) -> Tensor:
        """From the VAE's latents [B, C, ...] to the transformer's."""
        return (latents - self._wide(self.shift, latents)) / self._wide(self.scale, latents)

    def denormalize(self, latents: Tensor) -> Tensor:
        """From the transformer's latents [B, C, ...] to the VAE's."""
        return latents * self._wide(self.scale, latents) + self._wide(self.shift, latents)

    @staticmethod
    def _wide(values: Tensor, like: Tensor) -> Tensor:
        return values.to(like).view(1, -1, *(1,) * (like.ndim - 2))


def _check_timestep(call: Mapping[str, Any], timestep: Any) -> None:
    name = next((name for name in _TIMESTEPS if name in call), None)
    if name is None:
        raise ValueError(f"gives its transformer no {' or '.join(_TIMESTEPS)}")
    given = call[name]
    told = torch.as_tensor(timestep).double().flatten()[0].item()
    if not isinstance(given, Tensor) or given.shape != (1,) or abs(float(given[0]) - told) > 1e-3 * max(told, 1.0):
        shown = given.tolist() if isinstance(given, Tensor) and given.numel() == 1 else type(given).__name__
        raise ValueError(f"tells its transformer the timestep {shown} where the scheduler's is {told:g}")
    if call.get("guidance") is not None:
        raise ValueError("tells its transformer the guidance")


def _video_shape(latents: Tensor) -> tuple[int, int, int, int]:
    channels, *frames, height, width = latents.shape[1:]
    return int(channels), int(frames[0] if frames else 1), int(height), int(width)


def _orders(value: Tensor) -> Iterator[tuple[int, ...]]:
    """Every order of dimensions behind the first, the present one first."""
    for rest in permutations(range(1, value.ndim)):
        yield (0, *rest)


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(dim) for dim in range(len(order)))


def _normalization(stepped: Tensor, decoded: Tensor) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """The order that makes a sample the VAE's latents, and their scale and shift for each channel."""
    if stepped.ndim not in (4, 5) or stepped.ndim != decoded.ndim:
        raise ValueError(
            f"has latents of shape {list(stepped.shape)}, and its VAE decodes {list(decoded.shape)}; needed are "
            "[B, C, F, H, W] or [B, C, H, W] on both sides"
        )
    for order in _orders(stepped):
        ordered = stepped.permute(order)
        if ordered.shape != decoded.shape:
            continue
        scale, shift = _scale_and_shift(ordered, decoded.float())
        wanted = Measured._wide(scale, ordered) * ordered + Measured._wide(shift, ordered)
        if torch.allclose(wanted, decoded.float(), rtol=1e-5, atol=1e-6):
            return order, scale, shift
    raise ValueError("turns its latents into the VAE's in another way than by a scale and a shift of each channel")


def _scale_and_shift(sample: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift [C] that the zeros and ones of a sample show."""
    samples, decoded = sample.movedim(1, 0).flatten(1), latents.movedim(1, 0).flatten(1)
    shift = torch.stack([row[own == 0][:1].mean() for own, row in zip(samples, decoded, strict=True)])
    one = torch.stack([row[own == 1][:1].mean() for own, row in zip(samples, decoded, strict=True)])
    return one - shift, shift


def _order(latents: Tensor, hidden: Any) -> tuple[int, ...]:
    """The order that makes the transformer's input latents of the VAE's, with further channels perhaps."""
    shown = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
    channels = latents.shape[1]
    if isinstance(hidden, Tensor) and hidden.ndim == latents.ndim:
        for order in _orders(hidden):
            ordered = hidden.permute(order)[:, :channels]
            if ordered.shape == latents.shape:
                ratio = (ordered.double() * latents.double()).sum() / latents.double().square().sum()
                if torch.allclose(ordered.double(), ratio * latents.double(), rtol=1e-3, atol=1e-4):
                    return order
    raise ValueError(
        f"gives its transformer {shown} where its latents are {list(latents.shape)}; packed tokens are not supported"
    )
