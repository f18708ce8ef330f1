"""Marks of the keys that may be others when a run is continued, and what a comparison of configurations makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qvgen.config.leaf_file import leaf_content
from qvgen.config.run_comparison import check_content, lasting
from qvgen.config.schema.may_differ import MayDiffer, keys_with, marks_of
from qvgen.errors import UserError
from qvgen.run_directory import write_plain

ARRAY = """
from dataclasses import dataclass
from typing import Annotated
from qvgen.config.schema.may_differ import MayDiffer
from qvgen.data.source import DataSource

raise RuntimeError("nobody imports this file to read its marks")

@dataclass
class ArrayClips(DataSource):
    path: Annotated[str, MayDiffer.FREE]
    length: int
"""


@pytest.fixture
def array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The configuration of a data source of somebody's own."""
    (tmp_path / "marked_array.py").write_text(ARRAY)
    monkeypatch.syspath_prepend(tmp_path)
    return {"_target_": "marked_array.ArrayClips", "path": "old.npy", "length": 8}


def write_run(folder: Path, plain: dict[str, Any]) -> Path:
    folder.mkdir()
    write_plain(folder / "config.yaml", plain)
    return folder


@pytest.mark.parametrize(
    ("group", "name", "free"),
    [
        ("model", "tiny", {"model.weights"}),
        ("model", "cogvideox", {"model.path", "model.transformer", "model.lora"}),
        ("model", "wan", {"model.path", "model.transformer", "model.lora"}),
        ("model", "wan2.2-a14b", {f"model.{key}" for key in ("path", "transformer", "lora", "lora_high", "lora_low")}),
        ("data", "clips", {"data.path", "data.videos", "data.cache", "data.readers"}),
        ("data", "moving_digits", set()),
    ],
)
def test_places_of_our_leaves_may_differ(group: str, name: str, free: set[str]) -> None:
    found = keys_with(MayDiffer.FREE, {group: leaf_content(group, name)})
    assert {key for key in found if key.startswith(f"{group}.")} == free


def test_keys_of_the_world_and_of_the_run_itself() -> None:
    marks = marks_of({})
    world = {key for key, mark in marks.items() if mark is MayDiffer.WORLD}
    of_strategy = {f"strategy.{key}" for key in ("name", "shard_size", "cpu_offload", "context_parallel")}
    assert world == {"devices", "num_nodes", *of_strategy}
    assert marks["accumulate"] is MayDiffer.FOLLOWING
    assert {"run_dir", "resume", "checkpoint", "trainer.profiler", "calibration.cache"} <= keys_with(MayDiffer.FREE, {})
    assert not {"seed", "steps", "bits", "trainer.precision", "strategy.threads", "optim"} & marks.keys()


def test_a_class_of_ones_own_declares_its_places(array: dict[str, Any], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"seed": 1, "data": array})
    moved = {"seed": 1, "data": {**array, "path": "new.npy"}}
    assert check_content(run, moved, resume=True, force=False) == (True, (), {})
    assert lasting(moved) == {"seed": 1, "data": {"_target_": "marked_array.ArrayClips", "length": 8}}
    with pytest.raises(UserError, match=r"data\.length is 8 there and 9 here"):
        check_content(run, {"seed": 1, "data": {**array, "length": 9}}, resume=True, force=False)


def test_a_stored_configuration_asks_no_class_but_our_own(array: dict[str, Any]) -> None:
    assert "data.path" in keys_with(MayDiffer.FREE, {"data": array})
    assert "data.path" not in keys_with(MayDiffer.FREE, {"data": array}, only_own=True)
    damaged = {"data": 5, "model": {"_target_": 7, "path": "x"}, "trainer": None, "callbacks": {"a": {"_target_": ""}}}
    assert "run_dir" in keys_with(MayDiffer.FREE, damaged, only_own=True)


def test_another_number_of_processes_takes_its_micro_batches_along(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"devices": 1, "accumulate": 4, "seed": 1})
    _, _, world = check_content(run, {"devices": 2, "accumulate": 2, "seed": 1}, resume=True, force=False)
    assert world == {"devices": ("1", "2"), "accumulate": ("4", "2")}
    with pytest.raises(UserError, match="accumulate is 4 there and 2 here"):
        check_content(run, {"devices": 1, "accumulate": 2, "seed": 1}, resume=True, force=False)
