"""Context parallelism of a training: which processes work on one sample, and whether a run can have it.

    ranks          0 1 | 2 3 | 4 5 | 6 7        strategy.context_parallel=2, devices=8
    samples         a     b     c     d         the same noise and timestep in a group: both follow from the sample's number
    loss            whole in every process, the same in a group
    gradients      each its tokens' part; averaged over all 8 as ever, so that 2 times the loss gives the mean of 4 samples

Ranks of a group follow each other: a launcher that deals ranks out over nodes in turn would put a group's attention on the
network.
"""

from __future__ import annotations

from qvgen.errors import UserError
from qvgen.models.context_parallel import check_context
from qvgen.training.design.training_run import TrainingRun


def check_run_context(run: TrainingRun, *, samples: bool) -> None:
    """Refuse what can't be trained with a shared sequence, or sampled on the way; reads no weights.

    Args:
        run: The training.
        samples: Whether it samples validation videos.

    Raises:
        UserError: See :func:`qvgen.models.context_parallel.check_context`, or an option that looks at whole sequences.
    """
    processes = run.strategy.context_parallel
    if processes == 1:
        return
    if run.steps.loss.feature_weight:
        raise UserError(
            f"strategy.context_parallel={processes} and loss.feature_weight={run.steps.loss.feature_weight}: a process has a "
            "part of the tokens inside of the blocks whose outputs are compared; leave one of them out"
        )
    if (attention := run.design.profile.attention) is not None:
        raise UserError(
            f"strategy.context_parallel={processes} and profile.attention={attention.kind}: attention of a shared sequence "
            "is diffusers' own, with a backward pass of its own; leave one of them out"
        )
    family = run.model.family
    by_token = getattr(family, "steps_by_token", False)
    if by_token and getattr(family, "takes_image", False):
        raise UserError(
            f"strategy.context_parallel={processes}: model={run.model.name} is told a timestep for each token, which is not "
            "held against one process; write strategy.context_parallel=1"
        )
    class_name = getattr(family, "transformer_class", type(family).__name__)
    given = {"numbers": getattr(family, "transformer_config", {}), "processes": processes, "name": run.model.name}
    check_context(class_name, **given, shapes=[run.model.rebuild(size).sample_shape for size in _sizes(run)])
    frames = getattr(family, "sampling_frames", None)
    if not samples or frames is None:
        return
    if by_token:
        raise UserError(
            f"strategy.context_parallel={processes} and evaluation.video_every_steps: model={run.model.name} is sampled with "
            "a timestep for each token, which is not held against one process; write evaluation.video_every_steps=null"
        )
    check_context(
        class_name,
        **given,
        shapes=[run.model.rebuild({"num_frames": frames}).sample_shape],
        remedy=f"another model.sampling_frames than {frames}, or evaluation.video_every_steps=null",
    )


def _sizes(run: TrainingRun) -> list[dict[str, int]]:
    """Sizes of clips, as arguments of the family; one without any stands for the family's own."""
    if run.data is None or not hasattr(run.data, "cut_settings") or not hasattr(run.model.family, "height"):
        return [{}]
    buckets = run.data.cut_settings(run.model.family).buckets
    return [{"num_frames": bucket.frames, "height": bucket.height, "width": bucket.width} for bucket in buckets]
