"""The formula that a scheduler of diffusers undoes, by its class and configuration; any other one is refused by name.

    FlowMatchEulerDiscreteScheduler                      flow matching, its shift or that of its dynamic shifting
    UniPC, DPMSolverMultistep with use_flow_sigmas       flow matching with flow_shift
    DDIM, DDPM, PNDM, DPMSolver*, UniPC, DEIS, Euler*,   prediction of the noise, betas linear in t; or v-prediction,
    LCM                                                  sqrt(beta) linear in t

Solvers of the second and third row differ in how they step; the noisy sample that the transformer sees at t is the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from qvgen.models.flow_scheduler import FLOW_SCHEDULER, check_plain_flow
from qvgen.models.objectives import NUM_TRAIN_TIMESTEPS, EpsilonPrediction, FlowMatching, VPrediction

_FLOW_SOLVERS = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler")
_NOISE_SOLVERS = (
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "LCMScheduler",
)  # fmt: skip

SCHEDULERS = tuple(dict.fromkeys((FLOW_SCHEDULER, *_FLOW_SOLVERS, *_NOISE_SOLVERS)))
"""Classes of schedulers whose objective is known."""


def objective_of(scheduler: Any, *, name: str, mu: float | None) -> FlowMatching | EpsilonPrediction | VPrediction:
    """Give the objective of a scheduler.

    Args:
        scheduler: One of the classes ``SCHEDULERS``.
        name: Name of the model, for messages.
        mu: Argument ``mu`` that the pipeline gives to ``set_timesteps``: the logarithm of a dynamic shift, or the shift
            itself where the scheduler's ``time_shift_type`` is linear; None where it gives none.

    Raises:
        ValueError: The scheduler's configuration is one of no known objective; the message names the key.
    """
    settings = scheduler.config
    if type(scheduler).__name__ == FLOW_SCHEDULER:
        is_dynamic = bool(settings["use_dynamic_shifting"])
        check_plain_flow(scheduler, name=name, invert_sigmas=False, use_dynamic_shifting=is_dynamic and mu is not None)
        if not is_dynamic:
            return FlowMatching(shift=float(settings["shift"]))
        assert mu is not None  # check_plain_flow has refused it
        shift = math.exp(mu) if settings["time_shift_type"] == "exponential" else mu
        if shift < 1:
            raise ValueError(
                f"{name}'s pipeline shifts noise levels by {shift:.3g} at this size; 1 or more, towards noise, is supported"
            )
        return FlowMatching(shift=shift)
    if settings.get("use_flow_sigmas"):
        _check(settings, name=name, prediction_type="flow_prediction", num_train_timesteps=NUM_TRAIN_TIMESTEPS)
        if settings.get("use_dynamic_shifting"):
            raise ValueError(
                f"{name}'s scheduler has use_dynamic_shifting=True beside use_flow_sigmas; False is supported"
            )
        return FlowMatching(shift=float(settings["flow_shift"]))
    _check(settings, name=name, num_train_timesteps=NUM_TRAIN_TIMESTEPS, trained_betas=None)
    betas = {"beta_start": settings["beta_start"], "beta_end": settings["beta_end"]}
    objective: EpsilonPrediction | VPrediction
    if settings["prediction_type"] == "epsilon":
        _check(settings, name=name, beta_schedule="linear")
        objective = EpsilonPrediction(**betas)
    else:
        _check(settings, name=name, prediction_type="v_prediction", beta_schedule="scaled_linear")
        is_zero, scale = bool(settings.get("rescale_betas_zero_snr")), float(settings.get("snr_shift_scale", 1.0))
        objective = VPrediction(**betas, zero_terminal_snr=is_zero, snr_shift_scale=scale)
    if not torch.allclose(scheduler.alphas_cumprod.float(), objective.alphas_cumprod, atol=1e-5):
        raise ValueError(f"{name}'s scheduler has noise levels of its own beside its betas (rescale_betas_zero_snr)")
    return objective


def _check(settings: Any, *, name: str, **wanted: Any) -> None:
    for key, value in wanted.items():
        if key in settings and settings[key] != value:
            raise ValueError(f"{name}'s scheduler has {key}={settings[key]}; model=diffusers supports {value}")
