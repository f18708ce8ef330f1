"""Schedulers of diffusers that visit the timesteps of a few-step model (:mod:`qvgen.models.few_step`).

Of a flow the noise level s at a timestep is timestep / 1000, whatever shift or layout scheduler and pipeline have of their
own. Without a sampler it is the model's own class; ``lcm`` is FlowMatchLCMScheduler:

    x0 = x - s v(x, s)          x' = (1 - s') x0 + s' noise, drawn anew in each step; s' = 0 after the last

Models that predict noise or v at whole timesteps t have a table of a_t and b_t in place of s. ``lcm`` is LCMScheduler (Latent
Consistency Models, arXiv 2310.04378, algorithm 4) with the table of the model's own scheduler:

    x0 = (x - b_t eps) / a_t, or a_t x - b_t v        z = c_out(t) x0 + c_skip(t) x        x' = a_t' z + b_t' noise
    c_skip = s^2 / ((10 t)^2 + s^2), c_out = 10 t / sqrt((10 t)^2 + s^2), s = 0.5;         x' = z in the last step

Without ``lcm`` such a model steps to its scheduler's own timesteps alone: DDIM's next timestep is a fixed distance away.

Two pipelines hand their scheduler a velocity from noise to clean samples: Mochi's, whose time is reversed, and that of
LTX-Video 13B, which says a timestep for each token.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qvgen.models.discrete_schedule import NUM_TRAIN_TIMESTEPS

OF_SCHEDULER = "scheduler"
LCM = "lcm"

_PLAIN = {
    "shift": 1.0, "flow_shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None,
}  # fmt: skip


def shown_timesteps(timesteps: Sequence[float], *, key: str = "model.timesteps") -> str:
    """Timesteps as a user writes them: model.timesteps=[1000,757,522]."""
    return f"{key}=[{','.join(f'{t:g}' for t in timesteps)}]"


def steps_along_a_flow(scheduler: Any) -> bool:
    """Whether a scheduler's model predicts the velocity of a flow, not noise or v at whole timesteps."""
    config = scheduler.config
    is_flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return bool(is_flow) or type(scheduler).__name__.startswith("FlowMatch")


def visited_timesteps(scheduler: Any, num_steps: int) -> tuple[float, ...]:
    """1000 times the noise levels that a scheduler whose steps are laid out visits, falling; the timesteps of discrete ones.

    Raises:
        ValueError: Two steps have one timestep.
    """
    found = tuple(float(t) for t in scheduler.timesteps)
    if scheduler.config.get("invert_sigmas"):
        found = tuple(NUM_TRAIN_TIMESTEPS - t for t in found)
    if list(found) != sorted(set(found), reverse=True):
        raise ValueError(
            f"model.timesteps={OF_SCHEDULER}: {type(scheduler).__name__} visits {list(found)} in {num_steps} steps, which do "
            "not fall; write a list"
        )
    return found


def visiting(scheduler: Any, timesteps: Sequence[float], *, sampler: str | None = None) -> Any:
    """Make a scheduler that visits these timesteps when it is asked for that many steps, however it is asked.

    No shift is applied to them. diffusers' schedulers take noise levels and make timesteps of them, which some round; the
    transformer has to be told the numbers that it was made for.

    Args:
        scheduler: The model's own.
        timesteps: 1000 times the noise levels, falling, in (0, 1000]; whole ones up to 999 of a model that predicts noise or
            v. Where the scheduler inverts them the transformer is told 1000 minus each.
        sampler: ``lcm``, or None for the model's own class.

    Raises:
        ValueError: The scheduler can't visit them.
    """
    if not steps_along_a_flow(scheduler):
        return _visiting_whole(scheduler, timesteps, sampler=sampler)
    is_reversed = bool(scheduler.config.get("invert_sigmas"))
    if sampler == LCM:
        found = _flow_lcm(is_reversed=is_reversed)
    else:
        found = type(scheduler).from_config(
            scheduler.config, **{key: value for key, value in _PLAIN.items() if key in scheduler.config}
        )
    set_timesteps, levels = found.set_timesteps, np.array(timesteps) / NUM_TRAIN_TIMESTEPS
    if "sigmas" not in inspect.signature(set_timesteps).parameters:
        raise ValueError(
            f"{shown_timesteps(timesteps)}: a {type(found).__name__} takes no noise levels of a list; write "
            f"model.sampler={LCM}, or model.timesteps={OF_SCHEDULER}"
        )
    told = [NUM_TRAIN_TIMESTEPS - t for t in timesteps] if is_reversed else list(timesteps)

    def set_own(
        num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, mu: Any = None,
        timesteps: Any = None,
    ) -> None:  # fmt: skip
        del mu
        _check_count(num_inference_steps, sigmas, timesteps, own=len(told))
        set_timesteps(len(told), device=device, sigmas=levels)
        found.timesteps = torch.tensor(told, dtype=torch.float32, device=device)

    found.set_timesteps = set_own
    return found


def _flow_lcm(*, is_reversed: bool) -> Any:
    """FlowMatchLCMScheduler that takes velocities of both directions; see the head of this file."""
    from diffusers import FlowMatchLCMScheduler

    found = FlowMatchLCMScheduler()
    lcm_step = found.step

    def step(
        model_output: Tensor, timestep: Any, sample: Tensor, generator: torch.Generator | None = None,
        per_token_timesteps: Tensor | None = None, return_dict: bool = True,
    ) -> Any:  # fmt: skip
        velocity = -model_output if is_reversed or per_token_timesteps is not None else model_output
        return lcm_step(velocity, timestep, sample, generator=generator, return_dict=return_dict)

    found.step = step
    return found


def _visiting_whole(scheduler: Any, timesteps: Sequence[float], *, sampler: str | None) -> Any:
    """The scheduler of a model that predicts noise or v; see :func:`visiting`."""
    given, last = shown_timesteps(timesteps), NUM_TRAIN_TIMESTEPS - 1
    if sampler != LCM:
        raise ValueError(
            f"{given}: a {type(scheduler).__name__} steps to timesteps of its own; write model.timesteps={OF_SCHEDULER}, or "
            f"model.sampler={LCM}"
        )
    if (odd := next((t for t in timesteps if t != round(t) or t > last), None)) is not None:
        raise ValueError(f"{given}: {odd:g} is no whole number up to {last}, which this model's timesteps are")
    from diffusers import LCMScheduler

    found = LCMScheduler.from_config(scheduler.config)
    found.alphas_cumprod = scheduler.alphas_cumprod  # CogVideoX's own has a shift that LCMScheduler does not know
    set_timesteps, told = found.set_timesteps, torch.tensor([round(t) for t in timesteps])

    def set_own(num_inference_steps: int | None = None, device: Any = None, timesteps: Any = None) -> None:
        _check_count(num_inference_steps, timesteps, own=len(told))
        set_timesteps(len(told), device=device, original_inference_steps=NUM_TRAIN_TIMESTEPS)
        found.timesteps = told.to(device)

    found.set_timesteps = set_own
    return found


def _check_count(asked: int | None, *laid_out: Any, own: int) -> None:
    """Raise ValueError where a pipeline asks for another number of steps."""
    counts = {len(steps) for steps in laid_out if steps is not None} | ({asked} if asked is not None else set())
    if counts != {own}:
        raise ValueError(f"{max(counts, default=0)} steps were asked of a model that has {own} of its own")


def draw_from(scheduler: Any, generator: torch.Generator) -> None:
    """Let a scheduler draw the noise of its steps from a generator, in place: Wan's pipelines give it none."""
    if "generator" in inspect.signature(scheduler.step).parameters:
        scheduler.step = partial(scheduler.step, generator=generator)
