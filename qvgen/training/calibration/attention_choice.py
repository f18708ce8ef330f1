"""Which form every attention in 8 bits has: smoothed keys and rotation by the error of the outputs, where both are left open.

    CACHE/attention-KEY.json    {attention: relative error of each of its forms}

The full-precision model samples the calibration's videos once; :mod:`qvgen.layers.attention_trial` says what is measured.
KEY is a hash of all that decides the errors, so that a run that is begun again, and another process, sample nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from qvgen.config.schema.sections import CalibrationConfig
from qvgen.data.claims import Claims
from qvgen.evaluation.sampled_teacher import SampledTeacher
from qvgen.layers.attention_form import AttentionForm
from qvgen.layers.attention_trial import AttentionSearch, attention_candidates, chosen_forms
from qvgen.layers.swap import select_linears
from qvgen.quant.attention_profile import AttentionProfile
from qvgen.run_directory import atomic_write
from qvgen.training.calibration.statistics import CalibratedModel

log = logging.getLogger(__name__)

FORMAT = 1
"""Part of the key; one more when the same settings would give other errors."""

Candidates = Mapping[str, Sequence[AttentionForm]]


def chosen_attentions(
    teacher: SampledTeacher, calibration: CalibrationConfig, profile: AttentionProfile | None
) -> dict[str, AttentionForm]:
    """The forms of a model's quantized attentions by name, those that are left open chosen.

    Args:
        teacher: The full-precision model.
        calibration: What it samples, and where errors are kept.
        profile: Of the model's attention; None: none is quantized.

    Raises:
        ValueError: Patterns or heads that the profile does not fit, or an attention that gives nothing to choose by.
    """
    family, model = teacher.family, teacher.transformer
    names = select_linears(model, include=family.include, exclude=family.exclude).quantized
    candidates = attention_candidates(model, profile, quantized=names)
    if profile is None or not profile.is_searched:
        return {name: forms[0] for name, forms in candidates.items()}
    sampled = CalibratedModel(teacher, calibration, needs=(), num_bands=1)
    parts = [FORMAT, sampled.key, {name: [form.to_dict() for form in of] for name, of in candidates.items()}]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    path = sampled.folder.parent / f"attention-{key}.json"
    with Claims(sampled.folder.parent, key="calibration.cache") as claims, claims.held(key):
        errors = _read(path, candidates)
        if errors is None:
            log.info(
                "attention: %d videos to choose the forms of %d attentions by", calibration.videos, len(candidates)
            )
            with AttentionSearch(model, candidates) as search:
                sampled.sample_videos()
            errors = search.errors()
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, json.dumps(errors).encode())
    chosen = chosen_forms(candidates, errors)
    log.info(
        "attention: keys smoothed in %d of %d, rotated in %d; squared error of the outputs %.3g, of the first form %.3g",
        sum(form.smooth_key for form in chosen.values()), len(chosen), sum(form.rotation for form in chosen.values()),
        fmean(map(min, errors.values())), fmean(of[0] for of in errors.values()),
    )  # fmt: skip
    return chosen


def _read(path: Path, candidates: Candidates) -> dict[str, list[float]] | None:
    """Errors that were measured before, in the order of the candidates; None where there are none, or damaged ones."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        errors = {name: [float(error) for error in found[name]] for name in candidates}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("%s is damaged (%s); it is measured again", path, error)
        return None
    if any(len(errors[name]) != len(forms) for name, forms in candidates.items()):
        log.warning("%s is damaged; it is measured again", path)
        return None
    return errors
