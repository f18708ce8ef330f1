"""`qvgen inspect`: one table, checked against the packed tensors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.deploy.checkpoint import load_packed
from qvgen.layers.swap import packed_layers


def test_the_table_has_every_layer_and_the_totals(short_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"packed={short_run / 'packed'}"]) == DONE
    shown = capsys.readouterr().out
    header, rule, *rows = shown.partition("\n\n")[0].splitlines()
    assert header.split() == ["layer", "shape", "bits", "profile", "bytes", "weight", "error"]
    assert set(rule) == {"-", " "}
    layers = packed_layers(load_packed(short_run / "packed"))
    for row, (name, layer) in zip(rows, layers.items(), strict=True):
        cells = row.split()
        assert cells[0] == name
        assert [int(cells[1]), int(cells[3])] == [layer.out_features, layer.in_features]
        assert cells[4:6] == ["w3a3", "paper"]
        assert int(cells[6]) == layer.nbytes()
        assert layer.weight_error is not None
        assert float(cells[7]) == pytest.approx(layer.weight_error, abs=1e-5)
    total = sum(layer.nbytes() for layer in layers.values())
    size = (short_run / "packed" / "model.safetensors").stat().st_size
    footer = shown.partition("\n\n")[2]
    assert f"36 layers of WanTransformer3DModel (tiny), 191488 weights, {total} bytes" in footer
    assert f"file {size} bytes" in footer
    assert "method=qvgen init=mse bits=3 seed=42 steps=12" in footer
    assert main(["inspect", f"run_dir={short_run}"]) == DONE
    assert capsys.readouterr().out == shown


def test_what_can_not_be_inspected_is_one_line(
    short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(short_run / "packed", tmp_path / "packed"))
    (copy / "model.safetensors").unlink()
    cases = {
        f"packed={copy}": "model.safetensors is missing; copy the whole packed directory",
        f"packed={tmp_path}": "manifest.json is missing; give a packed directory",
        f"run_dir={tmp_path / 'none'}": "manifest.json is missing; give a packed directory",
    }
    for argument, message in cases.items():
        assert main(["inspect", argument]) == BAD_INPUT
        shown = capsys.readouterr()
        assert shown.out == ""
        (line,) = shown.err.splitlines()
        assert message in line
