"""Faults on copies of a finished run, through the command line: refused by name or repaired, and nothing is lost.

One file of each kind that a run leaves is damaged, as a disk, another program or a cut copy damages it. Caches have theirs
in tests/data/test_latent_cache.py and tests/verbs/test_small_model.py, kills and full disks in tests/training/test_resume.py,
side files in tests/training/checkpoint/test_side_files.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qvgen.cli import main
from tests import runs

OVERRIDES = (
    "steps=3", "phi.ranks=[2]", "accumulate=1", "checkpoint.every_steps=1", "checkpoint.keep=9", *runs.UNSEEN,
    *runs.shallow(1),
)  # fmt: skip
NEWEST = "checkpoints/step-00000002.ckpt"


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of one block; change copies alone."""
    run_dir = tmp_path_factory.mktemp("small") / "run"
    assert runs.train(run_dir, *OVERRIDES) == 0
    return run_dir


def flip(path: Path) -> None:
    """One bit in the middle: of a weight, in a file of tensors."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def nonsense(path: Path) -> None:
    path.write_bytes(b'{"a": [1, 2')


@pytest.mark.parametrize("damage", [flip, cut, empty])
@pytest.mark.parametrize("verb", ["resume", "fold"])
def test_a_damaged_checkpoint_is_refused_by_name(
    verb: str, damage: Callable[[Path], None], small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = runs.copy_until(small_run, tmp_path / "run", step=2)
    damage(run_dir / NEWEST)
    before = runs.snapshot(run_dir)
    if verb == "fold":
        assert main(["fold", f"run_dir={run_dir}", f"out={tmp_path / 'out'}"]) == 2
    else:
        assert runs.train(run_dir, *OVERRIDES, "resume=true") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert NEWEST in last
    assert "delete it" in last
    assert {name: value for name, value in runs.snapshot(run_dir).items() if name in before} == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "damage"), [("start.safetensors", flip), ("layers.json", nonsense)], ids=["start", "layers"]
)
def test_a_damaged_start_is_refused_by_name_and_made_again(
    name: str, damage: Callable[[Path], None], small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = runs.copy_until(small_run, tmp_path / "run", step=2)
    damage(run_dir / name)
    assert runs.train(run_dir, *OVERRIDES, "resume=true") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"{run_dir / name} is damaged" in last
    assert "delete it and write resume=true" in last
    (run_dir / name).unlink()
    assert runs.train(run_dir, *OVERRIDES, "resume=true") == 0
    assert runs.packed_bytes(run_dir) == runs.packed_bytes(small_run)


@pytest.mark.parametrize("name", ["config.yaml", "identity.json"])
@pytest.mark.parametrize("damage", [cut, empty, nonsense])
def test_what_says_which_run_it_is_is_refused_by_name(
    name: str, damage: Callable[[Path], None], small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = runs.copy_until(small_run, tmp_path / "run", step=2)
    damage(run_dir / name)
    before = runs.snapshot(run_dir)
    assert runs.train(run_dir, *OVERRIDES, "resume=true") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert str(run_dir / name) in last or f"run_dir={run_dir} holds another configuration's run" in last
    assert runs.snapshot(run_dir) == before


@pytest.mark.parametrize("verb", ["inspect", "generate"])
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("manifest.json", cut), ("manifest.json", empty), ("manifest.json", nonsense),
        ("model.safetensors", flip), ("model.safetensors", cut), ("model.safetensors", empty),
    ],
)  # fmt: skip
def test_a_damaged_packed_model_is_refused_by_name(
    verb: str,
    name: str,
    damage: Callable[[Path], None],
    small_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    packed = tmp_path / "packed"
    shutil.copytree(small_run / "packed", packed)
    damage(packed / name)
    more = [f"out={tmp_path / 'out'}", "num_steps=1"] if verb == "generate" else []
    assert main([verb, f"packed={packed}", *more]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert str(packed) in last
    assert not list(tmp_path.rglob("*.mp4"))


def test_a_damaged_report_costs_a_comparison_one_row(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(small_run, damaged, ignore=shutil.ignore_patterns("checkpoints", ".lock"))
    cut(damaged / "report.json")
    assert main(["compare", str(small_run), str(damaged), f"out={tmp_path / 'out'}"]) == 0
    shown = capsys.readouterr()
    assert "report.json" in shown.out + shown.err
    assert (tmp_path / "out").exists()
