"""Which of the release's 50 groups of clips a call of the transformer uses, and the table by timestep that says the same.

Training took a group by the batch's first timestep mod 50, so every group has seen all noise levels. Sampling with the
release's option --fix counts groups down, from 49 on, once per CALL of the transformer; without it every call takes group 49:

    CogVideoX   one call per step (both halves of the guidance together)   step k: group 49 - k
    Wan         two calls per step, first the conditional one              step k: group max(49 - 2 k, 0), then one less

So a group belongs to a call of a step of one sampler. The table has an entry for each of its timesteps, and where a step has
two calls a second one for the unconditional call (:mod:`qvgen.layers.guidance_call` tells the model which one it is in).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from qvgen.deploy.importers.release_file import NUM_GROUPS

Clips = Literal["steps", "last", "mean"]


@dataclass(frozen=True, kw_only=True)
class ReleaseSampler:
    """How the release samples a class of transformers.

    Attributes:
        scheduler: Class of diffusers.
        settings: What its configuration must say.
        calls: Calls of the transformer for each step.
        remedy: How to get that scheduler.
    """

    scheduler: str
    settings: Mapping[str, Any]
    calls: int
    remedy: str


SAMPLERS: Mapping[str, ReleaseSampler] = {
    "CogVideoXTransformer3DModel": ReleaseSampler(
        scheduler="CogVideoXDDIMScheduler",
        settings={"timestep_spacing": "trailing"},
        calls=1,
        remedy="take the folder of CogVideoX-2b or -5b as it was published",
    ),
    "WanTransformer3DModel": ReleaseSampler(
        scheduler="UniPCMultistepScheduler",
        settings={"flow_shift": 3.0, "use_flow_sigmas": True},
        calls=2,
        remedy="write model.shift=3.0",
    ),
}


@dataclass(frozen=True, kw_only=True)
class ClipTable:
    """Entries of the packed tables, as weights of the release's groups.

    Attributes:
        timesteps: Timesteps of the entries, rising; None: one entry for all.
        guided: There are two entries for each timestep: those of conditional calls, then those of unconditional ones.
        mix: float32 [entries, 50], rows that sum to 1.
        said: In words, for the manifest.
        approximate: What of the release's sampler the table does not say; empty where it says all.
    """

    timesteps: tuple[float, ...] | None
    guided: bool
    mix: Tensor
    said: str
    approximate: str

    def place(self, entry: int) -> tuple[float | None, str]:
        """An entry's timestep (None: all), and the name of the call that it is for."""
        if self.timesteps is None:
            return None, "cond"
        return self.timesteps[entry % len(self.timesteps)], "cond" if entry < len(self.timesteps) else "uncond"

    def table(self, factors: Tensor) -> Tensor:
        """The packed table float32 [entries] of factors [50]; an entry of a single group is its factor, to the bit."""
        single = self.mix.amax(1) == 1
        mean = (self.mix.double() @ factors.double()).float()
        return torch.where(single, factors[self.mix.argmax(1)], mean)


def constant_table(clips: Clips) -> ClipTable:
    """One entry for all timesteps: of group 49 (``last``), or the mean of the groups (``mean``)."""
    if clips == "last":
        mix = torch.zeros(1, NUM_GROUPS)
        mix[0, -1] = 1.0
        return ClipTable(
            timesteps=None, guided=False, mix=mix, said=f"group {NUM_GROUPS - 1} at every step", approximate=""
        )
    mix = torch.full((1, NUM_GROUPS), 1.0 / NUM_GROUPS)
    return ClipTable(
        timesteps=None,
        guided=False,
        mix=mix,
        said=f"mean of the {NUM_GROUPS} groups",
        approximate="every call: the release has no such mean; it is for samplers that the release does not have",
    )


def step_groups(num_steps: int, *, calls: int, call: int = 0) -> list[int]:
    """The group of one of the calls of each step, in the order of sampling; the conditional call is the first.

    Example:
        >>> step_groups(50, calls=1)[:3], step_groups(50, calls=2)[:3], step_groups(50, calls=2)[24:27]
        ([49, 48, 47], [49, 47, 45], [1, 0, 0])
        >>> step_groups(50, calls=2, call=1)[:3], step_groups(50, calls=2, call=1)[23:27]
        ([48, 46, 44], [2, 0, 0, 0])
    """
    return [max(NUM_GROUPS - 1 - calls * step - call, 0) for step in range(num_steps)]


def step_table(scheduler: Any, *, transformer: str, num_steps: int) -> ClipTable:
    """The entry of each step of the release's sampler.

    Args:
        scheduler: The model's, new.
        transformer: Class of its transformer.
        num_steps: Steps of the sampler.

    Raises:
        ValueError: It is another sampler than the release's; the message says what would be it, and what works otherwise.
    """
    otherwise = "or write clips=mean, which any sampler may use"
    sampler = SAMPLERS.get(transformer)
    if sampler is None:
        raise ValueError(f"clips=steps: the release has no sampler of a {transformer}; write clips=mean or clips=last")
    name = type(scheduler).__name__
    if name != sampler.scheduler:
        raise ValueError(
            f"clips=steps: the model's scheduler is {name}, and the release counts its clips along the steps of "
            f"{sampler.scheduler}; {sampler.remedy}, {otherwise}"
        )
    for key, wanted in sampler.settings.items():
        if (found := scheduler.config.get(key)) != wanted:
            raise ValueError(
                f"clips=steps: the model's scheduler has {key}={found}, and the release samples with {wanted}; "
                f"{sampler.remedy}, {otherwise}"
            )
    scheduler.set_timesteps(num_steps)
    timesteps = [float(value) for value in scheduler.timesteps]
    if timesteps != sorted(set(timesteps), reverse=True):
        raise ValueError(
            f"num_steps={num_steps}: two steps have one timestep, and clips are chosen by it; take fewer steps"
        )
    groups = [
        group for call in range(sampler.calls) for group in step_groups(num_steps, calls=sampler.calls, call=call)[::-1]
    ]
    settings = ", ".join(f"{key}={value}" for key, value in sampler.settings.items())
    guided = sampler.calls > 1
    return ClipTable(
        timesteps=tuple(timesteps[::-1]),
        guided=guided,
        mix=torch.nn.functional.one_hot(torch.tensor(groups), NUM_GROUPS).float(),
        said=f"{num_steps} steps of {name} ({settings}){', two calls a step' if guided else ''}",
        approximate="",
    )


def check_clips(clips: str) -> None:
    """Raise ValueError for another word than those of :data:`Clips`."""
    if clips not in get_args(Clips):
        raise ValueError(f"clips={clips} is none of {', '.join(get_args(Clips))}")
