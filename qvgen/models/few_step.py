"""Few-step models: transformers that were distilled to be called at some three to eight timesteps, and at no others.

    model.timesteps          [1000, 757, 522]: the sampler's timesteps, falling; or ``scheduler``: those that the model's
                             scheduler visits in ``model.num_inference_steps``
    model.guidance_distilled the weights hold guidance: no call without the caption, neither in sampling nor in training
    model.sampler            ``lcm`` for students that predict the clean sample at each timestep: consistency models and
                             those of DMD. Null: the model's scheduler

``lcm`` is multistep consistency sampling (arXiv 2303.01469, algorithm 1): to the clean sample that the model predicts and
back to the next noise level with new noise. The schedulers are in :mod:`qvgen.models.few_step_scheduler`. All noise of a
video comes from one generator with the video's seed: its first noise, then that of each step.

Everything that draws, samples or calibrates asks :func:`own_timesteps`: training and held-out errors draw one of them for
each sample (:class:`FewSteps`), quantized layers have one band for each, and sampling visits them in their order. How the
model was distilled, by matching distributions (DMD, arXiv 2311.18828), by consistency or along trajectories, makes no
difference to training and calibration.

The list is of noise levels, 1000 times each. Most transformers are told these numbers; one may be told others, in its own
dtype or with time reversed, and then :func:`own_timesteps` has those.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qvgen.models.base import Objective
from qvgen.models.discrete_schedule import NUM_TRAIN_TIMESTEPS
from qvgen.models.few_step_scheduler import LCM, OF_SCHEDULER, shown_timesteps


def own_timesteps(family: Any) -> tuple[float, ...] | None:
    """The timesteps that a family's transformer is told, in the order of sampling; None: it is no few-step model."""
    found: tuple[float, ...] | None = getattr(family, "own_timesteps", None)
    return found


def own_levels(family: Any) -> tuple[float, ...] | None:
    """1000 times the noise levels of :func:`own_timesteps`, falling, in (0, 1000]: they are told as they are by most."""
    found: tuple[float, ...] | None = getattr(family, "own_levels", None)
    return own_timesteps(family) if found is None else found


def sampling_steps(family: Any, asked: int, *, needs: Collection[str] = ()) -> int:
    """Sampling steps where a family's videos are looked at inside: as many as asked for, but a few-step model's own.

    Args:
        family: The model family.
        asked: ``calibration.steps`` or ``init.steps``.
        needs: Kinds of statistics. Ranges are for static tables, which have an entry for every step that the model will be
            sampled with: those and no fewer are watched, and errors are measured at no others.
    """
    has_own = own_timesteps(family) is not None or "ranges" in needs
    return int(family.num_inference_steps) if has_own else asked


def draws_noise_anew(family: Any) -> bool:
    """Whether each sampling step of a family's student goes to the clean sample and back with new noise."""
    return getattr(family, "sampler", None) == LCM


def caption_dropout(family: Any, asked: float) -> float:
    """Probability that a training sample loses its caption: none for weights that hold guidance."""
    return 0.0 if getattr(family, "guidance_distilled", False) else asked


def read_timesteps(value: Any, *, num_steps: int) -> tuple[float, ...] | None:
    """Read ``model.timesteps``, for a family with so many sampling steps.

    Args:
        value: A list of numbers, None, or ``scheduler``.
        num_steps: ``model.num_inference_steps``.

    Returns:
        The numbers, exact in float32; None where it is no list.

    Raises:
        ValueError: They are no list of falling numbers in (0, 1000], or not as many as there are steps.
    """
    if value is None or value == OF_SCHEDULER:
        return None
    found = falling_timesteps(value, key="model.timesteps", other=f", {OF_SCHEDULER} or null")
    if num_steps != len(found):
        raise ValueError(
            f"model.num_inference_steps={num_steps}, and {shown_timesteps(value)} has {len(found)}; "
            f"write model.num_inference_steps={len(found)}"
        )
    return found


def falling_timesteps(value: Any, *, key: str = "timesteps", other: str = "") -> tuple[float, ...]:
    """The numbers of a list of timesteps, exact in float32.

    Args:
        value: The list.
        key: Name of what holds it, for messages.
        other: What may stand there besides, for messages.

    Raises:
        ValueError: It is no list of falling numbers in (0, 1000].
    """
    given = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if not given or any(isinstance(t, bool) or not isinstance(t, int | float) for t in given):
        raise ValueError(f"{key}={value} is no list of numbers; write for example [1000,757,522]{other}")
    shown = shown_timesteps(given, key=key)
    if outside := [t for t in given if not 0 < t <= NUM_TRAIN_TIMESTEPS]:
        raise ValueError(
            f"{shown}: {outside[0]:g} is outside of the schedule; timesteps are above 0 and at most {NUM_TRAIN_TIMESTEPS}"
        )
    rounded = tuple(torch.tensor(given, dtype=torch.float32).tolist())
    if list(rounded) != sorted(set(rounded), reverse=True):
        falling = ",".join(f"{t:g}" for t in sorted(set(given), reverse=True))
        raise ValueError(f"{shown} does not fall; write them in the order of sampling: [{falling}]")
    return rounded


def check_sampler(family: Any, *, timesteps: Any) -> None:
    """Raise ValueError where ``model.sampler`` of a family is none, or it has no timesteps.

    Args:
        family: Its ``sampler`` is looked at.
        timesteps: ``model.timesteps``.
    """
    if family.sampler is None:
        return
    if family.sampler != LCM:
        raise ValueError(f"model.sampler={family.sampler} is not known; write {LCM}, or null for the model's scheduler")
    if timesteps is None:
        raise ValueError(
            f"model.sampler={LCM} draws new noise at the timesteps of a few-step model, and model.timesteps is null; write "
            "for example model.timesteps=[1000,757,522] and model.num_inference_steps=3"
        )


def check_guidance(family: Any) -> None:
    """Raise ValueError for ``model.guidance_scale`` of a model whose weights hold guidance."""
    if not isinstance(family.guidance_distilled, bool):
        raise ValueError(f"model.guidance_distilled={family.guidance_distilled} is neither true nor false")
    _refuse_guidance(family, family.guidance_scale, key="model.guidance_scale")


def check_sampled_as_distilled(family: Any, *, num_steps: int, guidance_scale: float) -> None:
    """Raise ValueError where sampling is asked for that a few-step or guidance-distilled model was not made for."""
    steps = own_timesteps(family)
    if steps is not None and num_steps != family.num_inference_steps:
        raise ValueError(
            f"num_steps={num_steps}: model={family.name} is a few-step model of {family.num_inference_steps} steps "
            f"(model.timesteps); leave num_steps out"
        )
    _refuse_guidance(family, guidance_scale, key="guidance_scale")


def _refuse_guidance(family: Any, guidance_scale: float, *, key: str) -> None:
    if getattr(family, "guidance_distilled", False) and guidance_scale != 1:
        raise ValueError(
            f"{key}={guidance_scale:g} with model.guidance_distilled=true: the weights of model={family.name} hold guidance, "
            f"and a second one would be applied to it; write {key}=1"
        )


@dataclass(frozen=True, kw_only=True)
class FewSteps:
    """An objective whose noise levels are those of a few timesteps; all else is the given one's.

    Attributes:
        objective: The model's formula.
        timesteps: 1000 times the noise levels, falling, in (0, 1000]; each is drawn as often as any other.
        jitter: A timestep is moved by a uniform number between minus and plus this, within (0, 1000].

    Raises:
        ValueError: A jitter that carries a timestep past the middle between it and the next.
    """

    objective: Any
    timesteps: tuple[float, ...]
    jitter: float = 0.0

    def __post_init__(self) -> None:
        gaps = [high - low for high, low in zip(self.timesteps, [*self.timesteps[1:], 0.0], strict=True)]
        if not 0 <= self.jitter < min(gaps) / 2:
            raise ValueError(
                f"loss.timestep_jitter={self.jitter:g} mixes timesteps that are {min(gaps):g} apart; "
                f"use less than {min(gaps) / 2:g}"
            )

    @property
    def predicts_noise(self) -> bool:
        """Whether the model predicts the noise itself."""
        return bool(getattr(self.objective, "predicts_noise", False))

    def sample_sigma(self, *, generator: torch.Generator) -> Float[Tensor, ""]:
        """Draw one of the noise levels, float32 []; it takes one uniform number, as the model's own draw does."""
        place = torch.rand((), generator=generator).double() * len(self.timesteps)
        index = min(int(place), len(self.timesteps) - 1)
        moved = self.timesteps[index] + (2 * (float(place) - index) - 1) * self.jitter
        last = getattr(self.objective, "last_timestep", NUM_TRAIN_TIMESTEPS)
        return torch.tensor(min(moved, last) / NUM_TRAIN_TIMESTEPS, dtype=torch.float32)

    def timestep(self, sigma: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Convert noise levels to timesteps, float32 [...]: the model's own, to the bit, where there is no jitter."""
        found: Tensor = self.objective.timestep(sigma)
        levels = torch.tensor(self.timesteps, dtype=torch.float64) / NUM_TRAIN_TIMESTEPS
        steps = self.objective.timestep(levels).float().to(sigma.device)
        distance, index = (found[..., None] - steps).abs().min(-1)
        return torch.where(distance < 1e-3, steps[index], found)  # a float32 of 1000 is exact to 6e-5

    def add_noise(self, clean: Tensor, noise: Tensor, *, sigma: Float[Tensor, " B"]) -> Tensor:
        """Mix clean samples with noise; see :class:`qvgen.models.base.Objective`."""
        noisy: Tensor = self.objective.add_noise(clean, noise, sigma=sigma)
        return noisy

    def target(self, clean: Tensor, noise: Tensor, *, sigma: Float[Tensor, " B"]) -> Tensor:
        """Return the model's formula of a perfect prediction."""
        target: Tensor = self.objective.target(clean, noise, sigma=sigma)
        return target

    def noise(self, prediction: Tensor, *, noisy: Tensor, timestep: Float[Tensor, " B"]) -> Tensor:
        """Return the noise that a prediction implies."""
        noise: Tensor = self.objective.noise(prediction, noisy=noisy, timestep=timestep)
        return noise

    def signal_and_noise(self, timestep: Float[Tensor, " B"]) -> tuple[Tensor, Tensor]:
        """Return what clean samples and noise are multiplied with at timesteps."""
        signal, noise = self.objective.signal_and_noise(timestep)
        return signal, noise


def drawn_objective(objective: Any, family: Any) -> Objective:
    """The objective of a family whose formula is ``objective``: with draws of its few timesteps, where it has such."""
    timesteps = own_levels(family)
    found: Objective = objective if timesteps is None else FewSteps(objective=objective, timesteps=timesteps)
    return found
