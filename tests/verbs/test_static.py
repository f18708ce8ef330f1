"""init=static from the command line: tables for one sampler, other step counts refused or interpolated, training from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qvgen.cli import main
from qvgen.deploy.checkpoint import load_packed
from qvgen.deploy.manifest import read_manifest
from tests.runs import SHORT, UNSEEN, copy_until, packed_bytes, shallow, train

STEPS = 4
STATIC = ("init=static", "init.alpha=0.5", "bits=8", f"model.num_inference_steps={STEPS}", "calibration.videos=1")


def ptq(run_dir: Path, cache: Path, *overrides: str) -> int:
    keys = [key for key in SHORT if not key.startswith(("steps", "phi", "model.num"))]
    return main(
        ["ptq", *keys, *STATIC, *UNSEEN, *shallow(1), f"calibration.cache={cache}", f"run_dir={run_dir}", *overrides]
    )


def test_other_step_counts_are_refused_or_interpolated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    for kind in ("refuse", "interpolate"):
        assert ptq(tmp_path / kind, cache, f"init.other_steps={kind}", "evaluation.samples=0") == 0
        packed = tmp_path / kind / "packed"
        manifest = read_manifest(packed)
        assert manifest.timesteps is not None
        assert len(manifest.timesteps) == STEPS
        entry = json.loads((packed / "manifest.json").read_text())["layers"][0]
        assert (entry["activation"]["range"], entry["activation"]["clip_table"]) == ("static", STEPS)
        tensors = load_file(packed / "model.safetensors")
        assert tensors["proj_out.static_scale"].shape == (STEPS,)
        assert not any("clip" in name for name in tensors)

        def generate(num_steps: int, packed: Path = packed) -> int:
            return main(
                [
                    "generate",
                    f"packed={packed}",
                    "prompt=a red three standing still",
                    f"num_steps={num_steps}",
                    f"out={tmp_path / f'{packed.parent.name}-{num_steps}'}",
                ]
            )

        assert generate(STEPS) == 0
        capsys.readouterr()
        assert generate(STEPS + 3) == (2 if kind == "refuse" else 0)
        refused = "that the static scales were calibrated for" in capsys.readouterr().err
        assert refused == (kind == "refuse")


def test_training_starts_from_the_tables_and_learns_them(tmp_path: Path) -> None:
    keys = (*STATIC, f"calibration.cache={tmp_path / 'cache'}", "steps=4", "phi.ranks=[2]", "checkpoint.every_steps=2")
    keys += shallow(1)
    first, again = tmp_path / "first", tmp_path / "again"
    assert train(first, *keys, *UNSEEN) == 0
    copy_until(first, again, step=2)
    assert train(again, *keys, *UNSEEN, "resume=true") == 0
    assert packed_bytes(again) == packed_bytes(first)
    report = json.loads((first / "report.json").read_text())
    assert report["packed_vs_fake_max_abs"] == 0.0
    start = load_file(first / "start.safetensors")["proj_out.activation_quantizer.scale"]
    trained = load_packed(first / "packed").get_submodule("proj_out").static_scale
    assert start.shape == trained.shape == (STEPS,)
    assert not start.equal(trained)
