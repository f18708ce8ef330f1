"""The sections ``callbacks`` and ``logger``: anyone's Lightning classes, followed where the command names them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger

from qvgen.cli import BAD_INPUT, main
from qvgen.config.build import build
from qvgen.config.compose import compose_plain
from qvgen.config.conf_folder import using_directory
from qvgen.errors import UserError
from qvgen.run_directory import write_plain
from qvgen.training.distributed.child_command import worker_command
from qvgen.verbs._parts import run_facts

SOURCE = """
import lightning
from lightning.pytorch.loggers import CSVLogger

class Count(lightning.Callback):
    def __init__(self, *, every: int):
        if every < 1:
            raise ArithmeticError("every must be 1 or more")
        self.every = every

class Table(CSVLogger):
    pass

class Empty:
    pass
"""
EARLY = "lightning.pytorch.callbacks.EarlyStopping"
OF_LIGHTNING = "+callbacks.a._target_=lightning.pytorch.callbacks"
FILES = {
    "callbacks/early.yaml": f"early:\n  _target_: {EARLY}\n  monitor: val/relative_error\n  patience: 5\n",
    "callbacks/count.yaml": "count:\n  _target_: mine.parts.Count\n  every: 2\n",
    "callbacks/alone.yaml": "_target_: mine.parts.Count\nevery: 3\n",
    "logger/table.yaml": "_target_: mine.parts.Table\nsave_dir: ${run_dir}\nname: table\n",
    "experiment/watched.yaml": "# @package _global_\nlogger:\n  table:\n    _target_: mine.parts.Table\n    save_dir: x\n",
}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The present folder, with a package `mine` and a folder `conf` in it."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").touch()
    (tmp_path / "mine" / "parts.py").write_text(SOURCE)
    for name, text in FILES.items():
        (tmp_path / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


def made(*overrides: str, folder: Path | None = None) -> Any:
    return build("train", compose_plain("train", ["logger=csv", "steps=8", *overrides], extra_directory=folder))


def test_callbacks_on_the_command_line(mine: Path) -> None:
    assert made().callbacks == ()
    config = made(
        f"+callbacks.early._target_={EARLY}", "+callbacks.early.monitor=val/relative_error", "+callbacks.early.patience=5",
        "+callbacks.count._target_=mine.parts.Count", "+callbacks.count.every=4",
    )  # fmt: skip
    early, count = config.callbacks
    assert isinstance(early, EarlyStopping)
    assert (early.monitor, early.patience, type(count).__name__, count.every) == ("val/relative_error", 5, "Count", 4)
    facts = run_facts(config)
    assert facts["callbacks.mine"].startswith("source ")
    assert "callbacks.lightning" not in facts  # its version says it
    assert facts.keys() - run_facts(made()).keys() == {"callbacks.mine"}


def test_callbacks_of_the_users_folder_one_and_several(mine: Path) -> None:
    several = made("callbacks=[early,count]", "callbacks.count.every=7", folder=mine / "conf").callbacks
    assert [type(callback).__name__ for callback in several] == ["EarlyStopping", "Count"]
    assert several[1].every == 7
    (alone,) = made("callbacks=alone", folder=mine / "conf").callbacks
    assert alone.every == 3
    assert made("callbacks=early", "callbacks.early=null", folder=mine / "conf").callbacks == ()


def test_loggers_beside_ours_and_in_its_place(mine: Path) -> None:
    rate = "lightning.pytorch.callbacks.LearningRateMonitor"
    config = made("logger=wandb", "+logger.table._target_=mine.parts.Table", "+logger.table.save_dir=x")
    assert (config.logger.name, [type(one).__name__ for one in config.logger.further]) == ("wandb", ["Table"])
    config = made("logger=table", f"+callbacks.rate._target_={rate}", "run_dir=here", folder=mine / "conf")
    assert (config.logger.name, config.logger.further[0].save_dir) == ("csv", "here")
    assert isinstance(config.callbacks[0], LearningRateMonitor)
    config = made("experiment=watched", folder=mine / "conf")
    assert isinstance(config.logger.further[0], CSVLogger)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+callbacks.early.monitor=x"], "callbacks.early has no _target_; write +callbacks.early._target_=..."),
        (["+callbacks.early=3"], "callbacks.early has no _target_"),
        (["+callbacks.a._target_=mine.parts.Cuont"], "mine.parts has no Cuont; did you mean 'Count'"),
        (["+callbacks.a._target_=mine.parts.Count"], "callbacks.a.every is missing"),
        (["+callbacks.a._target_=mine.parts.Count", "+callbacks.a.every=x"], "callbacks.a.every='x' is of the wrong type"),
        (["+callbacks.a._target_=mine.parts.Count", "+callbacks.a.every=0"], "can't be made: every must be 1 or more"),
        (["+callbacks.a._target_=mine.parts.Empty"], "makes a Empty, which is no lightning.pytorch.callbacks.Callback"),
        (["+logger.a._target_=mine.parts.Empty"], "makes a Empty, which is no lightning.pytorch.loggers.Logger"),
        (["+callbacks.a._target_=qvgen.training.callbacks.steps.StepMetrics"], "is no callbacks.a of qvgen"),
        (["+logger.projct=x"], "unknown key 'logger.projct'; did you mean 'logger.project'"),
        ([f"{OF_LIGHTNING}.ModelCheckpoint"], "ModelCheckpoint is not taken: a run is continued from its own"),
        ([f"{OF_LIGHTNING}.TQDMProgressBar"], "TQDMProgressBar is not taken: the bar is"),
        ([f"{OF_LIGHTNING}.Timer", "+callbacks.a.duration=00:01:00:00"], "a clock would decide"),
        ([f"{OF_LIGHTNING}.StochasticWeightAveraging", "+callbacks.a.swa_lrs=0.1"], "not taken"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(words: list[str], message: str, mine: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        made(*words)


def test_a_stop_that_can_never_be_asked_for_is_refused_before_the_work(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "logger=csv", "steps=8", "dry_run=true", "callbacks=early", "--config-dir", "conf"]
    assert main(words) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "EarlyStopping looks at val/relative_error after each measurement, and the run has none before its end" in line
    )


def test_a_runs_configuration_and_a_worker_follow_what_the_command_named(mine: Path) -> None:
    plain = compose_plain("train", ["callbacks=count", "run_dir=run", "steps=8"], extra_directory=mine / "conf")
    words = worker_command("train", Path("worker.yaml"), plain)
    assert words[6:] == ["--trust", "mine.parts.Count"]
    assert build("train", plain, trusted=["mine.parts.Count"]).callbacks[0].every == 2
    del sys.modules["mine.parts"]
    with pytest.raises(UserError, match="mine.parts.Count is no callbacks.count of qvgen or of a plug-in"):
        build("train", plain, trusted=())
    (mine / "run").mkdir()
    write_plain(mine / "run" / "config.yaml", plain)
    with using_directory(None):
        build("fold", compose_plain("fold", ["run_dir=run"]))  # which needs no callback
    assert "mine.parts" not in sys.modules
