"""An export that is stopped or killed leaves nothing that looks whole, and the next call makes it whole."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qvgen import stop_request
from qvgen.cli import DONE, main
from tests.deploy.exporters.packed_models import save, tiny_wan
from tests.runs import snapshot
from tests.stops import run_stopped

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_wan(), tmp_path_factory.mktemp("packed") / "packed", profile="convrot", bits="w4a4")


@pytest.fixture(scope="module")
def whole(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of an export that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(command(packed, out)) == DONE
    return snapshot(out)


def command(packed: Path, out: Path) -> list[str]:
    return ["export", f"packed={packed}", f"out={out}", "target=bf16"]


@pytest.mark.parametrize("part", ["config.json", "diffusion_pytorch_model", "parity.html"])
def test_a_stopped_export_leaves_nothing(
    packed: Path, whole: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    out = tmp_path / "out"
    assert run_stopped(command(packed, out), signal.SIGTERM, "tempfile.mkstemp", part) == stop_request.TERMINATED
    assert list(tmp_path.iterdir()) == []
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"stopped while exporting; {packed} is whole, and {out} as it was; start again with: " in line
    assert main(command(packed, out)) == DONE
    assert snapshot(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_stop_while_files_are_put_in_place_waits_for_the_last(
    packed: Path, whole: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    code = run_stopped(command(packed, out), signal.SIGTERM, "os.rename", str(out / "config.json"))
    assert code == stop_request.TERMINATED
    assert f"stopped after {out} was written, which is whole" in capsys.readouterr().err
    (out / "mine.txt").unlink()
    assert snapshot(out) == whole


def test_what_a_killed_export_leaves_is_made_again(
    packed: Path, whole: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    killed = [sys.executable, "-m", "tests.stops", str(int(signal.SIGKILL)), "tempfile.mkstemp", "parity.html"]
    done = subprocess.run([*killed, *command(packed, out)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.unfinished"]  # with weights and config.json in it
    assert (tmp_path / ".out.unfinished" / "config.json").is_file()
    with caplog.at_level("WARNING"):
        assert main(command(packed, out)) == DONE
    assert f"{out} was not finished by an earlier call; it is made again" in caplog.text
    assert snapshot(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
