"""What several processes sample for a start: each pass once, and in the cache what one process puts there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
import torch

from qvgen.data.claims import Claims
from qvgen.data.sealed_tensors import write_sealed
from qvgen.initializers.base import Need
from qvgen.initializers.layer_part import MAX_INPUTS, LayerPart, kept_rows
from qvgen.initializers.prepare import PrepareConfig
from qvgen.training.calibration import statistics as calibration
from qvgen.training.calibration.statistics import CalibratedModel, read_statistics
from qvgen.training.start.run_calibration import calibrate_, sample_share
from qvgen.training.start.student import prepare_student
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


def of_three_videos(cache: Path) -> CalibratedModel:
    config = train_config("calibration.videos=3", "calibration.steps=4", f"calibration.cache={cache}", *shallow(1))
    teacher = sampled_teacher(config, config.model.load_teacher(), encode=config.model.encode)
    bands = PrepareConfig.num_noise_bands
    found = CalibratedModel(teacher, config.calibration, needs=get_args(Need), num_bands=bands)
    found._passes = [found._passes[0][-4:]]
    return found


def test_videos_of_one_pass_are_shared_out_and_have_the_bits_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second video is another process's, which has it at the third look; its part is damaged, so it is sampled again."""
    alone, shared = (of_three_videos(tmp_path / name) for name in ("alone", "shared"))
    (names,) = alone._passes
    alone.sample_missing()
    sampled: list[int] = []
    collected = CalibratedModel._collected
    monkeypatch.setattr(calibration, "POLL_SECONDS", 0)
    asked: list[str] = []

    def recorded(model: CalibratedModel, names: Sequence[str], number: int) -> dict[str, LayerPart]:
        sampled.append(number)
        return collected(model, names, number)

    def held_elsewhere(claims: Claims, key: str) -> bool:
        if key != shared._claim(names, 1):
            return True
        asked.append(key)
        if len(asked) == 3:
            for name, part in collected(shared, names, 1).items():
                file = calibration._part_file(shared.folder, name, 1)
                write_sealed(file, part.tensors(), key=calibration._key(shared.folder, file.stem))
            file.write_bytes(file.read_bytes()[:-1])
        return len(asked) > 3

    monkeypatch.setattr(CalibratedModel, "_collected", recorded)
    monkeypatch.setattr(Claims, "take", held_elsewhere)
    monkeypatch.setattr(Claims, "give_back", lambda claims, key: None)
    assert shared.by_video(2)
    assert not shared.by_video(1)
    shared.sample_missing(num_processes=2)
    assert sampled == [0, 2, 1]
    assert list((shared.folder / "videos").iterdir()) == []
    for name in names:
        mine, wanted = (read_statistics(model.folder, name) for model in (shared, alone))
        assert mine.num_rows == wanted.num_rows > MAX_INPUTS
        for kind in ("abs_max", "second_moment", "inputs"):
            assert torch.equal(getattr(mine, kind), getattr(wanted, kind))
        assert mine.ranges is not None
        assert wanted.ranges is not None
        assert mine.ranges.timesteps == wanted.ranges.timesteps
        assert torch.equal(mine.ranges.low, wanted.ranges.low)
        assert torch.equal(mine.ranges.high, wanted.ranges.high)


def test_rows_are_kept_alike_whatever_part_they_come_with() -> None:
    """The mean number of a kept row says whether early and late rows are kept as often: 12 standard errors are accepted."""
    draws, parts = torch.Generator().manual_seed(0), 5
    total: LayerPart | None = None
    every: list[torch.Tensor] = []
    for part in range(parts):
        rows = torch.arange(part * 2000, (part + 1) * 2000).unsqueeze(1).float()
        numbers = torch.rand(2000, generator=draws, dtype=torch.float64)
        every.append(numbers)
        kept = kept_rows(numbers)
        later = LayerPart(
            abs_max=torch.ones(1, 1), moment=None, inputs=rows[kept], draws=numbers[kept], num_rows=2000, ranges=None
        )
        if total is None:
            total = later
        else:
            total.join_(later)
    assert total is not None
    assert total.inputs is not None
    found = total.inputs.flatten()
    wanted = torch.cat(every).sort().indices[:MAX_INPUTS].sort().values  # as if all had come together
    assert torch.equal(found, wanted.float())
    standard_error = 2000 * parts / 12**0.5 / MAX_INPUTS**0.5
    assert abs(float(found.mean()) - 1000 * parts) < 12 * standard_error


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
    sample_share(ptq_method(config), profile=config.profile, teacher=teacher, num_processes=1)
    rows = list(tmp_path.glob("sensitivity-*.jsonl"))
    assert len(rows) == 1
    before = rows[0].read_bytes()
    monkeypatch.setattr(CalibratedModel, "_collect", lambda *_: pytest.fail("it is sampled already"))
    student, _ = prepare_student(config.model, student_design(config), seed=None)
    statistics, allocation = calibrate_(student, ptq_method(config), profile=config.profile, teacher=teacher)
    assert statistics is not None
    assert allocation is not None
    assert rows[0].read_bytes() == before
