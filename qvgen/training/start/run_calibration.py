"""What the full-precision model samples for a run's PTQ start, and what is measured there, by all processes that have room.

    rank 0    asks the others; takes passes of the calibration, or videos of a pass, then measurements, as they are free
    others    load the full-precision model, and do the same until all of it is in ``calibration.cache``

Who has taken what is said by locks (:mod:`qvgen.data.claims`): a process that ends gives its own back, and waits for nobody.
"""

from __future__ import annotations

from torch import nn

from qvgen.evaluation.mixed_precision_files import Allocation
from qvgen.evaluation.sampled_teacher import SampledTeacher
from qvgen.initializers.bit_budget import BitBudget
from qvgen.initializers.prepare import PrepareConfig
from qvgen.layers.attention_swap import use_attention_forms_
from qvgen.layers.swap import quantized_layers
from qvgen.models.few_step import own_timesteps
from qvgen.quant.grid import Profile
from qvgen.training.calibration.attention_choice import chosen_attentions
from qvgen.training.calibration.statistics import CalibratedModel
from qvgen.training.mixed_precision.allocation import allocate_bits_, measure_share
from qvgen.training.start.ptq_method import PTQMethod
from qvgen.training.start.shared import StartHelpers


def calibrate_(
    student: nn.Module,
    ptq: PTQMethod,
    *,
    profile: Profile,
    teacher: SampledTeacher,
    helpers: StartHelpers | None = None,
) -> tuple[CalibratedModel | None, Allocation | None]:
    """What the PTQ method has to know before it sets layers up; a mixed-precision method's layers get their bits here.

    Attentions get the form that the profile leaves to calibration, whatever the method.

    Args:
        student: Prepared; its weights are the full-precision ones.
        ptq: The PTQ method, and what is sampled for it.
        profile: The student's grids.
        teacher: The full-precision model.
        helpers: The other processes, which take passes and measurements of their own; None: there are none.

    Returns:
        Statistics of the layers, None where nothing is sampled; the allocation of bits, None where all have the same.

    Raises:
        UserError: A budget of bits that no choice meets, or a network of its metrics that is not there.
    """
    if profile.attention is not None and profile.attention.is_searched:
        use_attention_forms_(student, chosen_attentions(teacher, ptq.calibration, profile.attention))
    needs = ptq.needs(profile)
    if not needs:
        return None, None
    bands = next(iter(quantized_layers(student).values())).noise_band.num_bands
    statistics = CalibratedModel(teacher, ptq.calibration, needs=needs, num_bands=bands)
    if (
        helpers is not None
        and helpers.ask_calibration is not None
        and _has_several(ptq, statistics, helpers.world_size)
    ):
        helpers.ask_calibration()
        statistics.sample_missing(num_processes=helpers.world_size)
        helpers.check()
    if not isinstance(ptq.init, BitBudget):
        return statistics, None
    return statistics, allocate_bits_(student, ptq.init, profile=profile, teacher=teacher, statistics=statistics)


def _has_several(ptq: PTQMethod, statistics: CalibratedModel, num_processes: int) -> bool:
    """Whether there is something for another process to do."""
    missing = statistics.missing_passes()
    return isinstance(ptq.init, BitBudget) or len(missing) > 1 or (bool(missing) and statistics.by_video(num_processes))


def sample_share(ptq: PTQMethod, *, profile: Profile, teacher: SampledTeacher, num_processes: int) -> None:
    """As another process than rank 0, do what :func:`calibrate_` samples and measures, as far as nobody else does.

    It ends when all of it is in the cache. Each video, pass and measurement is one process's, so that its bits are the same
    whoever it was.

    Args:
        ptq: The PTQ method, and what is sampled for it.
        profile: The student's grids.
        teacher: The full-precision model.
        num_processes: How many do.
    """
    bands = len(own_timesteps(teacher.family) or ()) or PrepareConfig.num_noise_bands
    statistics = CalibratedModel(teacher, ptq.calibration, needs=ptq.needs(profile), num_bands=bands)
    statistics.sample_missing(num_processes=num_processes)
    if isinstance(ptq.init, BitBudget):
        measure_share(ptq.init, profile=profile, teacher=teacher, statistics=statistics)
