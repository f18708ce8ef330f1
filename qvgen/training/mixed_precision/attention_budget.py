"""Which attentions compute with 8-bit integers and which in floating point, under a budget of their own.

    unit           attentions of one group in one block
    sensitivity    of the unit's attentions in 8 bits, all else in full precision, in all windows of timesteps at once
    cost           8, 12 (``int8_qk``: one product in 8) or 16 bits x multiply-adds of both products; 16: floating point
    budget         ``init.mean_attention_bits`` of all multiply-adds

Beside the budgets of weights and activations, because what attention costs is a product of tokens with tokens, which neither
of them counts. The allocation is theirs: between groups by output error, inside a group by the group's own metrics.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn

from qvgen.errors import UserError
from qvgen.evaluation.mixed_precision_files import ALL_WINDOWS, Allocation, combined_scores
from qvgen.initializers.bit_budget import BitBudget
from qvgen.layers.attention_form import AttentionForm
from qvgen.layers.attention_swap import PRODUCT, quantized_attentions, use_attention_forms_
from qvgen.layers.attention_trial import AttentionTrial
from qvgen.layers.layer_group import LayerUnit, layer_units
from qvgen.layers.noise_band import NoiseBand
from qvgen.layers.quant_attention import AttentionProduct
from qvgen.models.base import VideoDiT
from qvgen.quant.attention_profile import ATTENTION_BITS, AttentionProfile
from qvgen.quant.bit_allocation import SideProblem, constant_widths
from qvgen.training.mixed_precision.layer_probe import Side
from qvgen.training.mixed_precision.probe_session import Session
from qvgen.training.mixed_precision.sensitivity import Measured, Quantizing, SensitivityMeasurement, Wanted

log = logging.getLogger(__name__)

FLOAT_BITS = 16
"""Bits of an attention's operands in floating point."""

_SIDE: Side = "attention"
_END = f".{PRODUCT}"


@dataclass(frozen=True, kw_only=True)
class AttentionMeasurement(SensitivityMeasurement):
    """Measures what attentions in 8 bits do to a full-precision model.

    Attributes:
        forms: Name of an attention -> its form; learned factors start at 1 and are left out.
    """

    forms: Mapping[str, AttentionForm] = field(default_factory=dict)

    def watched(self, wanted: Wanted) -> list[str]:
        """No Linear: what is counted is not in their inputs."""
        del wanted
        return []

    def sizes(self, session: Session, wanted: Wanted) -> dict[str, int]:
        """Multiply-adds of each attention in one call of the model; all calls have as many."""
        trials = {name: AttentionTrial((form,), name=name) for name, form in self.forms.items()}
        with session.probe.attending(trials):
            session.calls[0].again(session.model)
        return {name: trials[name.removesuffix(_END)].products for unit in wanted.units for name in unit.layers}

    def quantizer(self, session: Session, band: NoiseBand) -> Quantizing:
        """Puts products without learned factors in place of a unit's attentions."""

        def quantizing(unit: LayerUnit, bits: int, side: Side, window: int) -> AbstractContextManager[None]:
            del bits, side, window  # there is one of each
            names = [name.removesuffix(_END) for name in unit.layers]
            return session.probe.attending(
                {name: AttentionProduct(self.forms[name], noise_band=band, name=name) for name in names}
            )

        return quantizing

    def own_key(self) -> list[Any]:
        """The attentions and their forms."""
        return [{name: form.to_dict() for name, form in self.forms.items()}]


def measure_attentions(base: SensitivityMeasurement, forms: Mapping[str, AttentionForm]) -> tuple[Wanted, Measured]:
    """Measure what is not stored yet: every unit of these attentions in 8 bits.

    Args:
        base: Measures the model's Linears.
        forms: Name of an attention -> its form.
    """
    wanted = wanted_attentions(forms, family=base.teacher.family)
    plain = {name: replace(form, clips=False) for name, form in forms.items()}
    given = {item.name: getattr(base, item.name) for item in fields(base)}
    return wanted, AttentionMeasurement(**given, forms=plain).measure(wanted)


def wanted_attentions(forms: Mapping[str, AttentionForm], *, family: VideoDiT) -> Wanted:
    """The measurements of these attentions, all of one kind."""
    units = layer_units([f"{name}{_END}" for name in forms], family.layer_groups)
    widths = {ATTENTION_BITS[form.kind] for form in forms.values()}
    return Wanted(units=units, widths={_SIDE: tuple(widths)})


def allocate_attentions_(student: nn.Module, base: SensitivityMeasurement, allocation: Allocation) -> Allocation:
    """Measure, allocate, and take attentions of a prepared student that get no 8 bits back to floating point.

    Args:
        student: Its attentions have their forms.
        base: Measures the model's Linears.
        allocation: Of the Linears.

    Returns:
        It with the attentions' part; unchanged without a budget for them.

    Raises:
        UserError: A metric's network is not there.
    """
    init = base.init
    if init.mean_attention_bits is None:
        return allocation
    forms = {name: product.form for name, product in quantized_attentions(student).items()}
    wanted, measured = measure_attentions(base, forms)
    bits = allocate_attentions(init, wanted, measured)
    use_attention_forms_(student, {name: form for name, form in forms.items() if bits[name] < FLOAT_BITS})
    mean = sum(bits[name] * measured.values[f"{name}{_END}"] for name in bits) / sum(measured.values.values())
    log.info("allocated: %.3f bits of attention, budget %g", mean, init.mean_attention_bits)
    return replace(
        allocation,
        sensitivities=(*allocation.sensitivities, *measured.rows.values()),
        attention={name: bits[name] for name in forms},
        budget={**allocation.budget, _SIDE: f"mean {init.mean_attention_bits:g} bits"},
        mean_bits={**allocation.mean_bits, _SIDE: mean},
        metrics={**allocation.metrics, **measured.metrics},
    )


def check_attention_budget(init: BitBudget, *, attention: AttentionProfile | None) -> None:
    """Raise UserError where a budget of attention's bits is given and no attention is quantized, or none fits into it."""
    mean = init.mean_attention_bits
    if mean is None:
        return
    if attention is None:
        raise UserError(
            f"init.mean_attention_bits={mean:g} chooses among attentions in 8 bits, and "
            "profile.attention=none has none; write profile.attention=int8, or leave the budget out"
        )
    if mean <= (least := ATTENTION_BITS[attention.kind]):
        raise UserError(
            f"init.mean_attention_bits={mean:g} leaves nothing to choose: with profile.attention={attention.kind} an "
            f"attention has {least} or {FLOAT_BITS} bits; write more than {least}, or leave the budget out"
        )


def allocate_attentions(init: BitBudget, wanted: Wanted, measured: Measured) -> dict[str, int]:
    """Bits of every attention by its name, its kind's or 16, under ``init.mean_attention_bits``.

    Args:
        init: The budget.
        wanted: What was measured.
        measured: Sensitivities and multiply-adds.
    """
    assert init.mean_attention_bits is not None
    (integer_bits,) = wanted.widths[_SIDE]
    sums = [float(sum(measured.values[name] for name in unit.layers)) for unit in wanted.units]
    sizes = torch.tensor(sums, dtype=torch.float64)
    window = ALL_WINDOWS if init.windows > 1 else 0
    scores = combined_scores(measured.rows.values())
    keys = [(unit.group, unit.block, _SIDE, integer_bits, window) for unit in wanted.units]

    def table(values: list[float]) -> torch.Tensor:  # nothing is lost in floating point
        return torch.tensor([[value, 0.0] for value in values], dtype=torch.float64)

    error = table([measured.rows[key].output_error for key in keys])
    score = table([scores[key] for key in keys])
    problem = SideProblem(
        groups=tuple(unit.group for unit in wanted.units),
        widths=(integer_bits, FLOAT_BITS),
        output_error=error.unsqueeze(2),
        score=score.unsqueeze(2),
        whole_error=error,
        whole_score=score,
        cost=sizes.unsqueeze(1) * torch.tensor([integer_bits, FLOAT_BITS]),
        budget=init.mean_attention_bits * float(sizes.sum()),
    )
    chosen = constant_widths(problem)
    return {
        name.removesuffix(_END): chosen[index][0] for index, unit in enumerate(wanted.units) for name in unit.layers
    }
