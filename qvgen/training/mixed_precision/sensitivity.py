"""How much every unit of layers suffers from every bit-width: one measurement for each, kept as they come.

One side (weights or activations) of one unit (one group in one block) is quantized at a time, in one window of timesteps and
once in all of them, all else in full precision. Attentions are a third side (:mod:`.attention_budget`). Measured is

    output_error   mean squared change of the videos that are sampled so, pixels in [0, 1]
    scores         the group's own metrics of those videos (:mod:`qvgen.evaluation.damage`); without a text-image model for
                   cross-attention the change of its output on the calls that the full-precision model made

The error of single predictions was tried in place of the videos' and allocates worse (docs/log.md).

Cost of a measurement: one sampling with decoding, and the calls of one window for that substitute. Their number is units x
widths x sides x (windows and all), said before it starts. Rows are keyed by content; a killed run continues, and processes on
one cache measure each row once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from qvgen import work_item
from qvgen.data.claims import Claims
from qvgen.evaluation.mixed_precision_files import ALL_WINDOWS, Key, Sensitivity, SensitivityStore
from qvgen.evaluation.placement import placed
from qvgen.evaluation.prompts import calibration_prompts
from qvgen.evaluation.sampled_teacher import SampledTeacher
from qvgen.initializers.clip_search import start_clips_
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.input_kind import input_kinds
from qvgen.layers.layer_group import LayerUnit
from qvgen.layers.noise_band import NoiseBand, step_bands, watch_timestep
from qvgen.layers.noise_window import band_windows
from qvgen.models.few_step import own_timesteps, sampling_steps
from qvgen.quant.grid import Profile
from qvgen.training.calibration.statistics import CalibratedModel
from qvgen.training.mixed_precision.group_metric import GroupMetrics
from qvgen.training.mixed_precision.layer_probe import LayerProbe, Side
from qvgen.training.mixed_precision.probe_session import Session
from qvgen.training.mixed_precision.shared_rows import SharedRows
from qvgen.training.mixed_precision.trajectory import Sampling, record, sampling_of
from qvgen.training.progress import progress_bar

log = logging.getLogger(__name__)

FORMAT = 3
"""Part of the key; one more when the same settings would give other numbers."""

SEED_OFFSET = 20_000
"""Videos of the measurements have other noise than those of the calibration and those that are compared."""


Quantizing = Callable[[LayerUnit, int, Side, int], AbstractContextManager[None]]
"""Gives the context in which bits of one side of a unit are quantized in a window."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to be measured.

    Attributes:
        units: All of the model.
        widths: side -> candidate bit-widths; none where the budget leaves no choice.
    """

    units: tuple[LayerUnit, ...]
    widths: Mapping[Side, tuple[int, ...]]

    def keys(self, windows: int) -> Iterator[tuple[LayerUnit, int, Side, int]]:
        """(unit, bits, side, window) of every measurement, in the order in which they are made."""
        places = [*range(windows), ALL_WINDOWS] if windows > 1 else [0]
        for unit in self.units:
            for bits in sorted({bits for widths in self.widths.values() for bits in widths}):
                for side in self.widths:
                    if bits in self.widths[side]:
                        yield from ((unit, bits, side, window) for window in places)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Sensitivities and the trajectory's facts that the allocation needs.

    Attributes:
        rows: By (group, block, side, bits, window).
        window_of_band: Window of every noise band.
        window_calls: Calls of the transformer in each window.
        values: Linear -> values in its input over all calls.
        metrics: group -> names of its metrics.
    """

    rows: Mapping[Key, Sensitivity]
    window_of_band: tuple[int, ...]
    window_calls: tuple[int, ...]
    values: Mapping[str, int]
    metrics: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class SensitivityMeasurement:
    """Measures a full-precision model.

    Attributes:
        teacher: The full-precision model.
        init: A PTQ method that is a :class:`~qvgen.initializers.bit_budget.BitBudget` too.
        profile: Grids and rotation; each measurement has bits of its own.
        statistics: What calibration saw of each layer; it says which prompts are sampled, and in whose cache rows are kept.
    """

    teacher: SampledTeacher
    init: Any
    profile: Profile
    statistics: CalibratedModel

    def measure(self, wanted: Wanted) -> Measured:
        """Measure what is not stored yet.

        Raises:
            UserError: A metric's network is not there.
            ValueError: Too few sampling steps for the windows.
        """
        init, num_bands, transformer = self.init, self.statistics.num_bands, self.teacher.transformer
        metrics = GroupMetrics.load(init, list(dict.fromkeys(unit.group for unit in wanted.units)))
        prompts = calibration_prompts(self.statistics.calibration, self.teacher.family)
        steps = sampling_steps(self.teacher.family, init.steps)
        sampling = sampling_of(self.teacher, prompts, videos=init.videos, steps=steps, seed_offset=SEED_OFFSET)
        store = SensitivityStore(self._path(metrics, sampling))
        keys = list(wanted.keys(init.windows))
        missing = len(keys) - len({_row_key(*key) for key in keys} & store.read(warns=False).keys())
        log.info(
            "sensitivity: %d measurements (%d units x bits x sides x (%d windows and all)), %d of them stored; each samples "
            "%d videos of %d steps; metrics: %s",
            len(keys), len(wanted.units), init.windows, len(keys) - missing, init.videos, steps,
            ", ".join(f"{group} by {name}" for group, name in metrics.names.items()),
        )  # fmt: skip
        names = self.watched(wanted)
        band = step_bands(num_bands, own_timesteps(self.teacher.family))
        handle = watch_timestep(transformer, band)
        try:
            with placed(transformer), work_item.heard_of([transformer]):
                calls, videos = record(transformer, band, sampling, names=names)
                windows = band_windows([call.band for call in calls], num_windows=init.windows, num_bands=num_bands)
                session = Session(
                    model=transformer,
                    probe=LayerProbe(transformer, band, windows=windows),
                    sampling=sampling,
                    calls=calls,
                    call_windows=[windows[call.band] for call in calls],
                    videos=videos,
                    metrics=metrics,
                )
                values = self.sizes(session, wanted)
                with Claims(store.path.parent, key="calibration.cache") as claims:
                    shared = SharedRows(store, claims)
                    for row in self._rows(session, keys, shared=shared, band=band):
                        shared.add(row)
        finally:
            handle.remove()
        return Measured(
            rows={_row_key(*key): shared.rows[_row_key(*key)] for key in keys},
            window_of_band=windows,
            window_calls=tuple(session.call_windows.count(window) for window in range(init.windows)),
            values=values,
            metrics=metrics.names,
        )

    def _rows(
        self,
        session: Session,
        keys: Sequence[tuple[LayerUnit, int, Side, int]],
        *,
        shared: SharedRows,
        band: NoiseBand,
    ) -> Iterator[Sensitivity]:
        """Measure what neither is known nor measured by another process."""
        places = {_row_key(*key): key for key in keys}
        missing = [key for key in places if key not in shared.rows]
        quantizing = self.quantizer(session, band)
        turns = shared.missing(missing)
        bar = progress_bar(turns, desc="sensitivity", unit="measurement", total=len(missing)) if missing else turns
        for unit, bits, side, window in map(places.__getitem__, bar):
            work_item.begin(f"the sensitivity of {unit.name} at {bits} bits, {side}, window {window}")
            quantized = quantizing(unit, bits, side, window)
            began = time.monotonic()
            error, scores = session.measure(unit, quantized, window=window)
            yield Sensitivity(
                group=unit.group,
                block=unit.block,
                side=side,
                bits=bits,
                window=window,
                output_error=error,
                scores=scores,
                seconds=round(time.monotonic() - began, 4),
            )

    def watched(self, wanted: Wanted) -> list[str]:
        """Linears whose inputs are counted while the full-precision model samples."""
        return [name for unit in wanted.units for name in unit.layers]

    def sizes(self, session: Session, wanted: Wanted) -> dict[str, int]:
        """What of each of the units' modules is quantized: values in a Linear's input over all calls."""
        return {name: sum(call.values.get(name, 0) for call in session.calls) for name in self.watched(wanted)}

    def quantizer(self, session: Session, band: NoiseBand) -> Quantizing:
        """Makes the context of a measurement; a unit's layers are made once for all that follow each other."""
        made: dict[tuple[str, int], dict[str, FakeQuantLinear]] = {}

        def quantizing(unit: LayerUnit, bits: int, side: Side, window: int) -> AbstractContextManager[None]:
            if (unit.name, bits) not in made:
                made.clear()
                made[unit.name, bits] = self.layers(unit, bits, band)
            return session.probe.quantizing(made[unit.name, bits], side=side, window=window)

        return quantizing

    def layers(self, unit: LayerUnit, bits: int, band: NoiseBand) -> dict[str, FakeQuantLinear]:
        """The unit's layers, set up by the method with both sides at so many bits."""
        made = {}
        for name in unit.layers:
            linear = self.teacher.transformer.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            profile = with_bits(self.profile, (bits, bits))
            kind = input_kinds(self.teacher.transformer, [name])[name]
            made[name] = FakeQuantLinear(linear, profile=profile, noise_band=band, input_kind=kind)
            self.init.initialize_(made[name], statistics=self.statistics(name))
        if "inputs" in self.statistics.needs:
            start_clips_(made, (), statistics=self.statistics)
        return made

    def own_key(self) -> list[Any]:
        """What decides the values of rows beside the settings that all measurements have."""
        return []

    def _path(self, metrics: GroupMetrics, sampling: Sampling) -> Path:
        """A file of rows for all that decides their values."""
        init, profile = self.init, with_bits(self.profile, (8, 8)).to_dict()
        parts = [
            FORMAT, *self.own_key(), self.statistics.key, profile, init.alpha, init.seed, sampling.captions,
            sampling.seeds, init.steps, init.windows, self.teacher.family.guidance_scale,
            metrics.keys, sampling.negatives, *sampling.images(),
        ]  # fmt: skip
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
        return self.statistics.folder.parent / f"sensitivity-{key}.jsonl"


def with_bits(profile: Profile, bits: tuple[int, int]) -> Profile:
    """A profile with other bits of weight and activation."""
    return replace(
        profile, weight=replace(profile.weight, bits=bits[0]), activation=replace(profile.activation, bits=bits[1])
    )


def _row_key(unit: LayerUnit, bits: int, side: Side, window: int) -> Key:
    return (unit.group, unit.block, side, bits, window)
