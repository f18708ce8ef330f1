"""What several processes sample for a start: each pass once, and in the cache what one process puts there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qvgen.data.claims import Claims
from qvgen.initializers.prepare import PrepareConfig
from qvgen.training import calibration
from qvgen.training.calibration import CalibratedModel, read_statistics
from qvgen.training.start_calibration import calibrate_, sample_share
from qvgen.training.student import prepare_student
from qvgen.verbs._parts import ptq_method, sampled_teacher, student_design
from tests.runs import shallow, train_config


def statistics_in(cache: Path) -> CalibratedModel:
    config = train_config(
        "init=gptq", "calibration.videos=1", "calibration.steps=2", f"calibration.cache={cache}", *shallow(1)
    )
    teacher = sampled_teacher(config, config.model.load_teacher(), encode=config.model.encode)
    ptq = ptq_method(config)
    found = CalibratedModel(
        teacher, ptq.calibration, needs=ptq.needs(config.profile), num_bands=PrepareConfig.num_noise_bands
    )
    (names,) = found._passes
    found._passes = [names[:3], names[3:6], names[6:]]  # as with less calibration.memory_gib
    return found


def test_a_pass_that_another_process_samples_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, shared, other = (statistics_in(tmp_path / name) for name in ("alone", "shared", "shared"))
    alone.sample_missing()
    collected: list[str] = []
    collect = CalibratedModel._collect
    monkeypatch.setattr(calibration, "POLL_SECONDS", 0)

    def recorded(model: CalibratedModel, names: list[str]) -> None:
        collected.extend(f"{'other' if model is other else 'own'} {name}" for name in names)
        collect(model, names)

    def held_elsewhere(claims: Claims, key: str) -> bool:
        """Hold the second pass for another process, which ends once it is asked for again."""
        if key != shared._claim(shared._passes[1]):
            return True
        asked.append(key)
        if len(asked) == 3:
            other._collect(list(other._passes[1]))
        return len(asked) > 3

    asked: list[str] = []
    monkeypatch.setattr(CalibratedModel, "_collect", recorded)
    monkeypatch.setattr(Claims, "take", held_elsewhere)
    monkeypatch.setattr(Claims, "give_back", lambda claims, key: None)
    shared.sample_missing()
    first, second, third = shared._passes
    assert collected == [f"own {name}" for name in (*first, *third)] + [f"other {name}" for name in second]
    assert shared.missing_passes() == []
    for name in (*first, *second, *third):
        mine, wanted = (read_statistics(model.folder, name) for model in (shared, alone))
        assert torch.equal(mine.abs_max, wanted.abs_max)
        assert mine.second_moment is not None
        assert wanted.second_moment is not None
        assert torch.equal(mine.second_moment, wanted.second_moment)


def test_a_process_without_a_student_samples_and_measures_what_rank_0_will_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = (
        "calibration.videos=1",
        "calibration.steps=2",
        f"calibration.cache={tmp_path}",
        "init.videos=1",
        "init.steps=4",
    )
    metrics = [f"init.metrics.{name}=output" for name in ("cross_attention", "self_attention", "ffn")]
    budget = (
        "init=vidit_q_mp",
        "bits=4",
        "init.mean_weight_bits=5",
        "init.candidates=[4,6]",
        "init.windows=1",
        "method=lsq",
    )
    config = train_config(*keys, *budget, *metrics, *shallow(1))
    teacher = sampled_teacher(config, config.model.load_teacher(), encode=config.model.encode)
    sample_share(ptq_method(config), profile=config.profile, teacher=teacher)
    rows = list(tmp_path.glob("sensitivity-*.jsonl"))
    assert len(rows) == 1
    before = rows[0].read_bytes()
    monkeypatch.setattr(CalibratedModel, "_collect", lambda *_: pytest.fail("it is sampled already"))
    student, _ = prepare_student(config.model, student_design(config), seed=None)
    statistics, allocation = calibrate_(student, ptq_method(config), profile=config.profile, teacher=teacher)
    assert statistics is not None
    assert allocation is not None
    assert rows[0].read_bytes() == before
