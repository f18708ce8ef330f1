"""A few-step student from a run's configuration: its bands, calibration, static tables and packed model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qvgen.cli import main
from qvgen.config.leaves import load_leaf
from qvgen.data.video_reader import read_video
from qvgen.deploy.checkpoint import load_packed
from qvgen.deploy.manifest import read_manifest
from qvgen.evaluation.held_out import HeldOut
from qvgen.layers.swap import packed_layers, quantized_layers
from tests.parts import calibrated_model, planned_student, prepared
from tests.runs import SHORT, UNSEEN, train, train_config

OWN = [500.0, 750.0, 900.0, 1000.0]
FEW_STEP = ("model=tiny_fewstep", "model.num_inference_steps=4")  # tests.runs asks for two steps


def test_the_student_has_a_band_for_each_timestep() -> None:
    """In the run, and on the meta device where it is planned; held-out inputs are at the timesteps, the same each time."""
    config = train_config(*FEW_STEP)
    for student in (prepared(config)[0], planned_student(config)[0]):
        layers = quantized_layers(student)
        assert {layer.noise_band.timesteps for layer in layers.values()} == {tuple(OWN)}
        assert layers["proj_out"].activation_quantizer.clip_low.shape == (4,)
    split = config.data.open(config.model, split="held_out")
    drawn = HeldOut(config.model, split, num_samples=16, batch_size=16)._batches[0]
    assert set(drawn.timestep.tolist()) == set(OWN)


def test_three_bits_end_to_end(tmp_path: Path) -> None:
    """Training, packing, and sampling from the packed folder by the run's sampler: 3 bits, 4 steps with new noise in each."""
    run = tmp_path / "run"
    words = (*FEW_STEP, "model.sampler=lcm", "bits=3", "method=kd", "steps=6", "evaluation.samples=8", *UNSEEN)
    assert train(run, *words) == 0
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["packed_codes_equal"]
    assert report["packed_vs_fake_max_abs"] == 0.0
    assert report["relative_error"]["packed"] < report["relative_error"]["ptq"] < 1
    manifest = read_manifest(run / "packed")
    assert (list(manifest.timesteps or ()), manifest.num_noise_bands, manifest.strict_timesteps) == (OWN, 4, False)
    model = load_packed(run / "packed")
    assert {layer.noise_band.timesteps for layer in packed_layers(model).values()} == {tuple(OWN)}
    out = tmp_path / "out"
    assert main(["generate", f"packed={run / 'packed'}", "prompt=a red three standing still", f"out={out}"]) == 0
    (file,) = out.glob("*.mp4")
    shown = torch.as_tensor(read_video(file))[:, 8::16, 8::16].float()  # files of small models are enlarged
    apart = {}
    for sampler in ("lcm", None):
        family = load_leaf("model", "tiny_fewstep", sampler=sampler)
        (video,) = family.generate(model, ["a red three standing still"], [42], num_steps=4, guidance_scale=1.0)
        apart[sampler] = (video.float() - shown).abs().mean()
    assert apart["lcm"] < 0.5 * apart[None], apart  # the file's codec loses something


def test_calibration_samples_as_the_model_is_sampled(tmp_path: Path) -> None:
    """Ranges of the first step are those of the same noise; those of the later ones are of the sampler's own inputs."""
    found = {}
    for sampler in ("null", "lcm"):
        words = (f"calibration.cache={tmp_path}", "calibration.videos=1", "init=static", "init.alpha=0.5", "bits=4")
        config = train_config(*FEW_STEP, f"model.sampler={sampler}", *words)
        teacher = config.model.load_teacher()
        found[sampler] = calibrated_model(config, teacher=teacher, encode=config.model.encode)
    assert found["null"].key != found["lcm"].key
    euler, lcm = (found[sampler]("blocks.0.attn1.to_q").ranges for sampler in ("null", "lcm"))
    assert euler.timesteps == lcm.timesteps == tuple(OWN)
    assert [torch.equal(a, b) for a, b in zip(euler.high, lcm.high, strict=True)] == [False, False, False, True]


def test_static_tables_are_of_its_timesteps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Calibration samples at them, so that the tables fit the bands; a plan says so."""
    keys = [key for key in SHORT if not key.startswith(("steps", "phi"))]
    words = ["ptq", *keys, *FEW_STEP, "init=static", "init.alpha=0.5", "bits=4", "calibration.videos=1", *UNSEEN,
             f"calibration.cache={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}", "evaluation.samples=0"]  # fmt: skip
    assert main([*words, "dry_run=true"]) == 0
    assert "from 1 videos of 4 steps" in capsys.readouterr().out
    assert main(words) == 0
    packed = load_packed(tmp_path / "run" / "packed")
    layer = packed.get_submodule("proj_out")
    assert layer.noise_band.timesteps == tuple(OWN)
    assert layer.static_scale.shape == (4,)
    assert bool(torch.isfinite(layer.static_scale).all())
