"""From a budget to bits per layer: what has to be measured, the allocation, and the layers that get their bits.

    units          layers of one group in one block (:mod:`qvgen.layers.layer_group`)
    sensitivities  :mod:`qvgen.training.mixed_precision.sensitivity`
    allocation     :mod:`qvgen.quant.bit_allocation`: weights and activations apart, each under its own budget

Attentions in 8 bits have a budget of their own (:mod:`.attention_budget`).

Cost of weights: mean bits that run, or with ``init.weights_mib`` bytes as they are packed (6 bits lie in a byte; two widths
are two sets of codes). Cost of activations: bits of the values that are quantized in the sampled videos. Groups without a
metric of their own, and the split between groups, go by the output error: mean squared change of the sampled videos.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from qvgen.errors import UserError
from qvgen.evaluation.mixed_precision_files import ALL_WINDOWS, Allocation, Key, combined_scores
from qvgen.evaluation.sampled_teacher import SampledTeacher
from qvgen.initializers.bit_budget import BitBudget
from qvgen.layers.attention_swap import attention_forms
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.layer_group import layer_units
from qvgen.layers.swap import quantized_layers, select_linears
from qvgen.models.base import VideoDiT
from qvgen.models.few_step import sampling_steps
from qvgen.quant.bit_allocation import SideProblem, constant_widths, windowed_widths
from qvgen.quant.grid import Profile
from qvgen.quant.packing import plane_shapes
from qvgen.quant.width_table import WidthTable
from qvgen.training.calibration.attention_choice import chosen_attentions
from qvgen.training.calibration.statistics import CalibratedModel
from qvgen.training.design.student import StudentDesign
from qvgen.training.mixed_precision.attention_budget import (
    allocate_attentions_,
    check_attention_budget,
    measure_attentions,
    wanted_attentions,
)
from qvgen.training.mixed_precision.group_metric import GroupMetrics
from qvgen.training.mixed_precision.sensitivity import Measured, SensitivityMeasurement, Side, Wanted, with_bits

log = logging.getLogger(__name__)

_MIB = 2**20


def allocate_bits_(
    student: nn.Module, init: BitBudget, *, profile: Profile, teacher: SampledTeacher, statistics: CalibratedModel
) -> Allocation:
    """Measure, allocate, and give a prepared student's layers their bits, before the method sets them up.

    Args:
        student: Prepared; its weights are the full-precision ones.
        init: The PTQ method.
        profile: The student's grids; where a budget says nothing else, their bits are the budget.
        teacher: The full-precision model.
        statistics: What calibration saw of each layer.

    Raises:
        UserError: A budget that no choice meets, or a network that is not there.
        ValueError: Too few sampling steps for the windows of timesteps.
    """
    layers = quantized_layers(student)
    wanted = wanted_measurements(init, list(layers), profile=profile, family=teacher.family)
    measurement = SensitivityMeasurement(teacher=teacher, init=init, profile=profile, statistics=statistics)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    allocation = allocate_budget(init, wanted, measurement.measure(wanted), profile=profile, shapes=shapes)
    allocation = allocate_attentions_(student, measurement, allocation)
    for name, bits in allocation.bits.items():
        give_bits_(layers[name], bits, window_of_band=allocation.window_of_band)
    for side, mean in allocation.mean_bits.items():
        log.info("allocated: %.3f bits of %ss, budget %s", mean, side, allocation.budget[side])
    return allocation


def measure_share(init: BitBudget, *, profile: Profile, teacher: SampledTeacher, statistics: CalibratedModel) -> None:
    """Measure what :func:`allocate_bits_` needs to know beside the process that calls it, which finds it in the cache."""
    family = teacher.family
    names = select_linears(teacher.transformer, include=family.include, exclude=family.exclude).quantized
    wanted = wanted_measurements(init, names, profile=profile, family=family)
    measurement = SensitivityMeasurement(teacher=teacher, init=init, profile=profile, statistics=statistics)
    measurement.measure(wanted)
    if init.mean_attention_bits is not None:
        measure_attentions(measurement, chosen_attentions(teacher, statistics.calibration, profile.attention))


def give_bits_(layer: FakeQuantLinear, bits: Mapping[int, tuple[int, int]], *, window_of_band: Sequence[int]) -> None:
    """Set a layer's widths; where they differ between windows of timesteps it has a table by noise band."""
    weights, activations = zip(*bits.values(), strict=True)
    profile = with_bits(layer.profile, (min(weights), min(activations)))
    if profile != layer.profile:
        layer.move_(profile=profile)
    if len(set(bits.values())) > 1:
        layer.set_width_table_(WidthTable(bands=tuple(bits[window] for window in window_of_band)))


def check_mixed_precision(init: BitBudget, names: Sequence[str], *, design: StudentDesign, family: VideoDiT) -> None:
    """Find out in seconds what would fail after hours.

    Args:
        init: The PTQ method.
        names: Linears that are quantized.
        design: The student's.
        family: The model family.

    Raises:
        UserError: A metric's network that is not there, or Phi beside weights of two widths.
        ValueError: Patterns of the model's groups that contradict each other.
    """
    if init.weight_windows is not None and design.phi_rank:
        raise UserError(
            f"init.weight_windows={list(init.weight_windows)} gives layers two sets of weights, and Phi makes up for the "
            "loss of one; use method=lsq or qvgen ptq"
        )
    check_attention_budget(init, attention=design.profile.attention)
    wanted = wanted_measurements(init, names, profile=design.profile, family=family)
    GroupMetrics.load(init, list(dict.fromkeys(unit.group for unit in wanted.units)))


def wanted_measurements(init: BitBudget, names: Sequence[str], *, profile: Profile, family: VideoDiT) -> Wanted:
    """What the budgets make necessary to measure; nothing of a side whose budget leaves no choice.

    Args:
        init: The budgets.
        names: Linears that are quantized.
        profile: Their grids.
        family: Says which layers belong together.
    """
    means = _mean_budgets(init, profile)
    widths: dict[Side, tuple[int, ...]] = {}
    for side, mean in means.items():
        found = set(init.widths(mean))
        free = mean < max(found)
        if side == "weight":
            found.update(width for width in init.weight_windows or () if width is not None)
            free = free or init.weights_mib is not None or init.weight_windows is not None
        widths[side] = tuple(sorted(found)) if free else ()
    return Wanted(units=layer_units(names, family.layer_groups), widths=widths)


def _mean_budgets(init: BitBudget, profile: Profile) -> dict[Side, float]:
    """The budget of each side in mean bits."""
    return {
        "weight": init.mean_weight_bits or profile.weight.bits,
        "activation": init.mean_activation_bits or profile.activation.bits,
    }


def plan_measurements(init: BitBudget, *, profile: Profile, family: Any) -> str:
    """How much there is to measure, without weights."""
    with torch.device("meta"):
        skeleton = family.build(family.transformer_config)
    names = select_linears(skeleton, include=family.include, exclude=family.exclude).quantized
    wanted = wanted_measurements(init, names, profile=profile, family=family)
    groups = {unit.group: sum(other.group == unit.group for other in wanted.units) for unit in wanted.units}
    count, steps = sum(1 for _ in wanted.keys(init.windows)), sampling_steps(family, init.steps)
    if init.mean_attention_bits is not None:
        attentions = attention_forms(skeleton, profile.attention, quantized=names)
        units = wanted_attentions(attentions, family=family).units
        groups[f"attention in {len(units)} blocks"] = len(units)
        count += len(units)
    return (
        f"sensitivity: {count} measurements ({', '.join(f'{n} of {group}' for group, n in groups.items())}; "
        f"{init.windows} windows and all at once), each samples {init.videos} videos of {steps} steps"
        if count
        else "sensitivity: none, the budgets leave no choice"
    )


def allocate_budget(
    init: BitBudget, wanted: Wanted, measured: Measured, *, profile: Profile, shapes: Mapping[str, tuple[int, int]]
) -> Allocation:
    """The allocation of measured sensitivities.

    Args:
        init: The budgets.
        wanted: What was measured.
        measured: The sensitivities.
        profile: The student's grids.
        shapes: Layer -> (out_features, in_features).

    Raises:
        UserError: A budget that no choice meets.
    """
    weights = {name: prod(shape) for name, shape in shapes.items()}
    sizes: dict[Side, Mapping[str, int]] = {"weight": weights, "activation": measured.values}
    means = _mean_budgets(init, profile)
    chosen: dict[Side, list[list[int]]] = {}
    for side, mean in means.items():
        if not wanted.widths[side]:
            chosen[side] = [[int(mean)] * init.windows for _ in wanted.units]
            continue
        size = torch.tensor([[float(sum(sizes[side][name] for name in unit.layers))] for unit in wanted.units])
        cost = size.double() * torch.tensor(wanted.widths[side])
        budget = mean * float(size.double().sum())
        if side == "weight" and init.weights_mib is not None:
            cost, budget = _byte_costs(wanted, shapes), init.weights_mib * _MIB
        problem = side_problem(wanted, measured, side=side, cost=cost, budget=budget)
        try:
            chosen[side] = _side_widths(init, problem, side=side, calls=measured.window_calls)
        except ValueError as error:
            raise UserError(
                f"bits of {side}s, candidates {list(wanted.widths[side])}: {error} (one bit of all is {float(size.sum()):g}, "
                f"times {sum(measured.window_calls)} calls where bits change over windows; weights_mib counts bytes)"
            ) from error
    bits = {
        name: {window: (chosen["weight"][u][window], chosen["activation"][u][window]) for window in range(init.windows)}
        for u, unit in enumerate(wanted.units)
        for name in unit.layers
    }
    budgets = {side: f"mean {mean:g} bits" for side, mean in means.items()}
    if init.weights_mib is not None:
        budgets["weight"] = f"{init.weights_mib:g} MiB of codes"
    return Allocation(
        sensitivities=tuple(measured.rows.values()),
        bits={name: bits[name] for name in shapes},
        units={name: (unit.group, unit.block) for unit in wanted.units for name in unit.layers},
        window_of_band=measured.window_of_band,
        budget=budgets,
        mean_bits={side: _mean_bits(bits, sizes[side], side, measured.window_calls) for side in means},
        weight_bytes=sum(_code_bytes(shapes[name], {pair[0] for pair in bits[name].values()}) for name in shapes),
        metrics=measured.metrics,
    )


def _side_widths(init: BitBudget, problem: SideProblem, *, side: Side, calls: Sequence[int]) -> list[list[int]]:
    """Bits of each unit in each window."""
    if side == "activation" and init.activation_windows:
        return windowed_widths(problem, steps=calls)
    fixed = init.weight_windows if side == "weight" else None
    runs = fixed is not None and init.weights_mib is None
    return constant_widths(problem, fixed=fixed, steps=calls if runs else None)


def side_problem(wanted: Wanted, measured: Measured, *, side: Side, cost: Tensor, budget: float) -> SideProblem:
    """The sensitivities of a side as tables."""
    count = len(measured.window_calls)
    errors = {key: row.output_error for key, row in measured.rows.items()}
    scores = combined_scores(measured.rows.values())

    def table(values: Mapping[Key, float], windows: Sequence[int]) -> Tensor:
        rows = [
            [[values[unit.group, unit.block, side, bits, window] for window in windows] for bits in wanted.widths[side]]
            for unit in wanted.units
        ]
        return torch.tensor(rows, dtype=torch.float64)

    whole = [ALL_WINDOWS if count > 1 else 0]
    return SideProblem(
        groups=tuple(unit.group for unit in wanted.units),
        widths=wanted.widths[side],
        output_error=table(errors, range(count)),
        score=table(scores, range(count)),
        whole_error=table(errors, whole).squeeze(2),
        whole_score=table(scores, whole).squeeze(2),
        cost=cost,
        budget=budget,
    )


def _byte_costs(wanted: Wanted, shapes: Mapping[str, tuple[int, int]]) -> Tensor:
    """Bytes of the packed codes, float64 [U, B]."""
    widths = wanted.widths["weight"]
    rows = [
        [sum(_code_bytes(shapes[name], {bits}) for name in unit.layers) for bits in widths] for unit in wanted.units
    ]
    return torch.tensor(rows, dtype=torch.float64)


def _code_bytes(shape: tuple[int, int], widths: set[int]) -> int:
    """Bytes of the planes of a layer's packed codes, one set of planes for each width."""
    planes = [plane_shapes(bits=bits, out_features=shape[0], in_features=shape[1]) for bits in widths]
    return sum(prod(plane) for of_width in planes for plane in of_width)


def _mean_bits(
    bits: Mapping[str, Mapping[int, tuple[int, int]]], sizes: Mapping[str, int], side: Side, calls: Sequence[int]
) -> float:
    """Mean bits of one side, over its weights or quantized values and over all calls of the model while videos are sampled.

    It says what runs, in contrast to what is stored: a set of codes that is used in one window counts in that window alone.
    """
    place = ("weight", "activation").index(side)
    total = sum(sizes[name] * calls[window] * pair[place] for name, of in bits.items() for window, pair in of.items())
    return total / (sum(sizes[name] for name in bits) * sum(calls))
