"""Whether a folder's FlowMatchEulerDiscreteScheduler samples the plain flow that a family trains, its noise levels unbent.

Resolution-dependent shifts, stretched ends, Karras, exponential and beta levels and stochastic steps are further arguments of
diffusers' class. A family whose model is sampled with one of them needs an objective that knows it.
"""

from __future__ import annotations

from typing import Any

from qvgen.models.objectives import NUM_TRAIN_TIMESTEPS

FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"

_PLAIN = {
    "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}


def check_plain_flow(scheduler: Any, *, name: str, **further: Any) -> None:
    """Hold a scheduler to the plain flow.

    Args:
        scheduler: One of the class ``FLOW_SCHEDULER``.
        name: Name of the model, for the message.
        further: Arguments that the model is sampled with besides -> their only values.

    Raises:
        ValueError: An argument has another value; the message names it with both.
    """
    for key, value in {**_PLAIN, **further}.items():
        if scheduler.config[key] != value:
            raise ValueError(f"{name}'s scheduler has {key}={scheduler.config[key]}; {value} is supported")
