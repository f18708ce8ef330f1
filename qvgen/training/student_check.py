"""Whether a model can be quantized as a configuration asks, found out before its weights are read."""

from __future__ import annotations

import torch

from qvgen.config.schema import TrainConfig
from qvgen.deploy.checkpoint import check_kernel
from qvgen.initializers.bit_budget import BitBudget
from qvgen.layers.shared_input import unshare_activations_
from qvgen.layers.swap import add_switch_widths_, quantized_layers, select_linears
from qvgen.training.meta_model import Prepared, build_transformer, prepare_


def check_student(config: TrainConfig) -> Prepared | None:
    """Find out without weights, in seconds, whether the model can be quantized as asked.

    Returns:
        What :func:`qvgen.training.meta_model.build_student` returns, for a plan; None where widths change while sampling,
        for which more is set up here.

    Raises:
        ValueError: An impossible schedule of Phi; patterns, bits, groups or ranks that do not fit the model's layers.
        RuntimeError: A kernel that was asked for by name does not run here.
    """
    config.method.schedule(config.phi, num_steps=config.steps)
    if config.activation_switch.widths is not None and "ranges" in config.init.needs:
        raise ValueError(
            f"init={config.names.init} has one table of scales; activation_switch.widths can't change its bits"
        )
    skeleton = build_transformer(config.model)
    if hasattr(config.model, "check_transformer"):
        config.model.check_transformer(skeleton)
    chosen = select_linears(skeleton, include=config.model.include, exclude=config.model.exclude)
    if isinstance(config.init, BitBudget):
        from qvgen.training.mixed_precision.allocation import check_mixed_precision  # with its metrics

        check_mixed_precision(config, chosen.quantized)
    prepare_(skeleton.train(), config, names=chosen.quantized)
    if config.activation_switch.widths is not None:
        unshare_activations_(quantized_layers(skeleton))
        add_switch_widths_(skeleton, config.activation_switch.widths)
    check_kernel(skeleton, kernel=config.kernel, device=torch.device("cpu"))
    return None if config.activation_switch.widths is not None else (skeleton, chosen)
