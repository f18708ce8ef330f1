"""The loss of a micro-batch: the models are asked, the method compares their answers and says what is trained."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from qvgen.config.schema.loss import LossConfig
from qvgen.config.schema.sections import OptimConfig
from qvgen.data.noise import NoisyBatch
from qvgen.errors import UserError
from qvgen.methods.base import Method
from qvgen.models.base import VideoDiT
from qvgen.training.design.meta_model import num_blocks
from qvgen.training.loss.block_features import check_blocks, check_features, compared_outputs, feature_loss
from qvgen.training.loss.min_snr import check_weighting, weighted_loss
from qvgen.training.loss.noise_level import training_objective
from qvgen.training.loss.ode_window import check_window


def prediction_loss(
    family: VideoDiT,
    student: nn.Module,
    draw: NoisyBatch,
    condition: Mapping[str, Tensor],
    *,
    method: Method,
    teacher: nn.Module | None,
    options: LossConfig | None = None,
) -> Tensor:
    """What a method makes of a student's prediction.

    Args:
        family: Calls transformers of this kind.
        student: The transformer that is trained.
        draw: Noised samples with their data's own target.
        condition: Encoded captions, on the models' device.
        method: The training method.
        teacher: The frozen full-precision transformer, where the method needs it.
        options: What each noise level counts, and blocks that are compared too; None: all the same, and none.

    Returns:
        float32 [].
    """
    with compared_outputs(student, options) as outputs:
        prediction = family.predict(student, draw.noisy, draw.timestep, condition)
    reference: Tensor | None = None
    wanted: list[Tensor] = []
    if teacher is not None:
        # In its own dtype: autocast would cast every weight of it again in each step.
        with (
            torch.no_grad(),
            torch.autocast(draw.noisy.device.type, enabled=False),
            compared_outputs(teacher, options) as wanted,
        ):
            reference = family.predict(teacher, draw.noisy, draw.timestep, condition)
    target = draw.target
    if method.compares == "noise":
        if not hasattr(family.objective, "noise"):
            raise UserError(
                f"{type(method).__name__} compares noise, and {type(family.objective).__name__} has no noise(prediction, "
                "noisy, timestep); write it (qvgen.models.base.Objective), or choose another method"
            )
        noise = partial(family.objective.noise, noisy=draw.noisy, timestep=draw.timestep)
        prediction, target = noise(prediction.float()), noise(target)
        reference = None if reference is None else noise(reference.float())

    def loss_of(part: slice) -> Tensor:
        given = None if reference is None else reference[part]
        return method.loss(prediction[part], teacher=given, target=target[part], timestep=draw.timestep[part])

    if options is None or options.weighting == "none":
        loss = method.loss(prediction, teacher=reference, target=target, timestep=draw.timestep)
    else:
        loss = weighted_loss(
            loss_of, draw.timestep, objective=family.objective, compares=method.compares, limit=options.snr_limit
        )
    if options is not None and outputs:
        loss = loss + options.feature_weight * feature_loss(outputs, wanted)
    return loss


def check_loss(loss: LossConfig, *, method: Method, name: str, family: VideoDiT) -> None:
    """Raise UserError for options that a method, called ``name``, or a family's model cannot have.

    It is asked before anything is computed.

    Args:
        loss: The options.
        method: The training method.
        name: What the user calls it.
        family: The model family.
    """
    if method.trains == "autoencoder":
        if not loss.draws_as_the_model or loss.weighting != "none" or loss.feature_weight:
            raise UserError(f"method={name} trains a VAE, which sees no noise levels; leave the keys loss.* out")
        return
    check_window(method, name=name, family=family)
    if not loss.draws_as_the_model:
        training_objective(family.objective, loss)
    if loss.weighting == "min_snr":
        check_weighting(family.objective)
    if loss.feature_weight:
        check_features(loss, method=method, name=name)
        check_blocks(loss.feature_blocks, count=num_blocks(family))


def freeze_the_rest_(student: nn.Module, *, method: Method, optim: OptimConfig) -> None:
    """Let no gradient be computed for what no group trains: it would pile up, and count in the gradients' norm.

    Raises:
        ValueError: The method trains nothing.
    """
    trained = {id(parameter) for group in method.parameter_groups(student, optim) for parameter in group["params"]}
    if not trained:
        raise ValueError(f"{type(method).__name__}.parameter_groups gives no parameter; name what is trained")
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in trained)
