"""Whether a model can be quantized as a configuration asks, found out before its weights are read."""

from __future__ import annotations

from typing import Any

import torch

from qvgen.deploy.kernel_choice import check_kernel
from qvgen.initializers.base import Initializer
from qvgen.initializers.bit_budget import BitBudget
from qvgen.initializers.prepare import are_independent
from qvgen.layers.shared_input import unshare_activations_
from qvgen.layers.swap import add_switch_widths_, quantized_layers, select_linears
from qvgen.methods.base import Method
from qvgen.training.design.meta_model import Prepared, build_transformer, is_recorded, planned_transformer, prepare_
from qvgen.training.design.student import StudentDesign
from qvgen.training.start.ptq_method import PTQMethod


def check_student(
    family: Any,
    design: StudentDesign,
    ptq: PTQMethod,
    *,
    num_steps: int,
    kernel: str = "auto",
    is_planned: bool = False,
) -> Prepared | None:
    """Find out without weights, in seconds, whether a model can be quantized as asked.

    Args:
        family: The model family.
        design: The student's layers.
        ptq: The PTQ method that it starts from.
        num_steps: Optimizer steps; 0 for none.
        kernel: Backend that is to run the packed model.
        is_planned: Whether nothing runs afterwards, so that a record of the model will do.

    Returns:
        What :func:`qvgen.training.design.meta_model.build_student` returns, for a plan; None where widths change while
        sampling, for which more is set up here.

    Raises:
        ValueError: An impossible schedule of Phi; patterns, bits, groups or ranks that do not fit the model's layers.
        RuntimeError: A kernel that was asked for by name does not run here.
    """
    design.schedule(num_steps)
    widths = design.switch_widths
    if widths is not None and "ranges" in ptq.init.needs:
        raise ValueError(f"init={ptq.name} has one table of scales; activation_switch.widths can't change its bits")
    skeleton = planned_transformer(family) if is_planned and is_recorded(design) else build_transformer(family)
    if hasattr(family, "check_transformer"):
        family.check_transformer(skeleton)
    chosen = select_linears(skeleton, include=family.include, exclude=family.exclude)
    if isinstance(ptq.init, BitBudget):
        from qvgen.training.mixed_precision.allocation import check_mixed_precision  # with its metrics

        check_mixed_precision(ptq.init, chosen.quantized, design=design, family=family)
    prepare_(skeleton.train(), family, design, names=chosen.quantized)
    if widths is not None:
        unshare_activations_(quantized_layers(skeleton))
        add_switch_widths_(skeleton, widths)
    check_kernel(skeleton, kernel=kernel, device=torch.device("cpu"))
    return None if widths is not None else (skeleton, chosen)


def why_not_streamed(design: StudentDesign, init: Initializer, *, name: str) -> str | None:
    """Why a start can't be made layer by layer without a model, in words that end with what to do; None where it can.

    Args:
        design: The student's layers.
        init: The PTQ method, without statistics.
        name: Its name.
    """
    if init.needs or not are_independent(init, folds=()):
        return f"init={name} looks at the whole model; write init=mse or init=rtn"
    if type(design.method).start_ is not Method.start_:
        return "the training method starts from the whole student; write method=qvgen, kd or lsq"
    if design.activation_switch is not None and design.activation_switch.widths is not None:
        return "activation_switch.widths are added to a whole student; leave them out"
    if design.profile.attention is not None and design.profile.attention.is_searched:
        return "forms of attention are chosen by what a whole model samples; write true or false in place of auto"
    if design.profile.attention is not None and design.profile.attention.clips:
        return "learned clips of attention are in no file of the model's; write profile.attention=int8, without clips"
    return None
