"""The section ``trainer``: each documented option of Lightning's Trainer is passed on, or refused with the reason."""

from __future__ import annotations

import inspect
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from qvgen.cli import BAD_INPUT, main
from qvgen.config import UserError
from qvgen.config.build import check
from qvgen.config.schema.trainer import REFUSED, TrainerConfig
from qvgen.training.optimizer_module import OptimizerModule
from qvgen.training.trainer import Processes, build_trainer, restored_settings, trainer_arguments
from tests.runs import composed, copy_until, one_block, packed_bytes, train, train_config

ALONE = Processes()


def built(tmp_path: Path, **changes: Any) -> lightning.Trainer:
    options = replace(train_config().trainer, **changes)
    arguments = trainer_arguments(options, gradient_clip=0.5, run_dir=tmp_path)
    with restored_settings():
        return build_trainer(steps=2, accumulate=1, processes=ALONE, callbacks=[], loggers=[], options=arguments)


def test_every_argument_of_lightnings_trainer_is_an_option_or_refused() -> None:
    arguments = set(inspect.signature(lightning.Trainer.__init__).parameters) - {"self"}
    options = {field.name for field in fields(TrainerConfig)}
    assert options | REFUSED.keys() == arguments
    assert not options & REFUSED.keys()


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        (
            "trainer.max_steps=5",
            "trainer.max_steps is not passed on: a run is counted in optimizer steps; write steps=",
        ),
        ("+trainer.max_time=00:01:00:00", "trainer.max_time is not passed on: a clock would decide"),
        ("trainer.gradient_clip_val=1", "write optim.gradient_clip="),
        ("trainer.benchmark=true", "cuDNN would choose its kernels by a clock"),
        ("trainer.precision=16-mixed", "trainer.precision=16-mixed is unknown"),
        ("trainer.profilr=simple", "unknown key 'trainer.profilr'; did you mean 'trainer.profiler'"),
        ("trainer.log_every_n_steps=0", "trainer.log_every_n_steps=0 must be greater than 0"),
    ],
)
def test_what_is_not_passed_on_is_refused_with_the_reason(
    word: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", word, "dry_run=true", "logger=csv"]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line


def test_a_refused_option_in_a_file_is_refused_too() -> None:
    plain = {**composed(), "trainer": {**composed()["trainer"], "accumulate_grad_batches": 2}}
    with pytest.raises(UserError, match="trainer.accumulate_grad_batches is not passed on: .*write accumulate="):
        check("train", plain)


def test_options_reach_the_trainer_and_the_process_is_as_before(tmp_path: Path) -> None:
    plain = built(tmp_path)
    assert (plain.precision, plain.profiler.__class__.__name__) == ("32-true", "PassThroughProfiler")
    assert (plain.log_every_n_steps, plain.min_steps, plain._detect_anomaly) == (1, None, False)
    assert (plain.gradient_clip_val, plain.gradient_clip_algorithm) == (0.5, "norm")
    changed = built(
        tmp_path, precision="bf16-mixed", profiler="advanced", log_every_n_steps=7, min_steps=2, detect_anomaly=True,
        gradient_clip_algorithm="value",
    )  # fmt: skip
    assert (changed.precision, changed.profiler.__class__.__name__) == ("bf16-mixed", "AdvancedProfiler")
    assert (changed.log_every_n_steps, changed.min_steps, changed._detect_anomaly) == (7, 2, True)
    assert changed.gradient_clip_algorithm == "value"
    options = trainer_arguments(
        replace(train_config().trainer, deterministic="warn"), gradient_clip=1.0, run_dir=tmp_path
    )
    before = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    with restored_settings():
        build_trainer(steps=2, accumulate=1, processes=ALONE, callbacks=[], loggers=[], options=options)
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == before


@pytest.mark.parametrize(
    ("algorithm", "limit", "clipped"),
    [
        ("norm", 0.5, [0.3, 0.4]),
        ("value", 0.5, [0.5, 0.5]),
        (None, 0.5, [0.3, 0.4]),
        ("norm", None, [3.0, 4.0]),
        ("value", None, [3.0, 4.0]),
    ],
)
def test_gradients_are_clipped_together_or_one_by_one_or_not(
    algorithm: str | None, limit: float | None, clipped: list[float]
) -> None:
    """(3, 4) has the norm 5: scaled to the norm 0.5, or each entry cut at 0.5; without a limit they stay."""

    class Module(OptimizerModule):
        @property
        def trained(self) -> torch.nn.Module:
            return self.net

    module = Module(optim=replace(train_config().optim, gradient_clip=limit), num_steps=1, seed=0)
    module.net = torch.nn.Linear(2, 1, bias=False)
    module.net.weight.grad = torch.tensor([[3.0, 4.0]])
    module.configure_gradient_clipping(torch.optim.SGD(module.net.parameters(), lr=0.1), limit, algorithm)
    assert module.gradient_norm is not None
    assert float(module.gradient_norm) == 5.0
    assert {name: float(norm) for name, norm in module.norms.items()} == {
        "train/gradient_norm": 5.0
    }  # no names of groups
    torch.testing.assert_close(module.net.weight.grad, torch.tensor([clipped]), atol=1e-6, rtol=0)


def test_a_profiled_run_says_where_the_time_went_and_has_the_same_bits(block_run: Path, tmp_path: Path) -> None:
    run_dir = copy_until(block_run, tmp_path / "run", step=9)
    assert train(run_dir, *one_block(), "trainer.profiler=simple", "resume=true") == 0
    assert packed_bytes(run_dir) == packed_bytes(block_run)
    text = (run_dir / "profiler" / "fit-simple.txt").read_text()
    assert "run_training_batch" in text
    assert "optimizer_step" in text
