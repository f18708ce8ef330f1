"""`qvgen ptq` on complete model folders without any clip: prompts and the model's own sampling are all that it has.

Checked against the recorded calls themselves, against the same packed weights made with clips, and against what is refused.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qvgen.cli import main
from qvgen.config.build import load_run
from qvgen.deploy.checkpoint import load_packed
from qvgen.evaluation.prompts import evaluation_prompts
from qvgen.evaluation.sampled_inputs import EncodedCaptions, SampledInputs
from qvgen.layers.swap import packed_layers
from qvgen.verbs._parts import sampled_teacher
from tests.models.hub_folders import make_cogvideox_folder, make_wan_folder
from tests.parts import calibrated_model
from tests.runs import packed_bytes
from tests.verbs.test_hub_models import tiny_keys, write_clips

MODELS: dict[str, tuple[Any, str]] = {
    "cogvideox1.5": (make_cogvideox_folder, "1.5"),
    "wan2.2-a14b": (make_wan_folder, "a14b"),
}
"""One of each class, with what the others of it lack: patches in time; two experts. The tests below take wan."""


def keys(name: str, folder: Path, tmp_path: Path, *more: str) -> list[str]:
    return [
        *tiny_keys(name, folder), "logger=csv", "bits=w4a6", "evaluation.samples=4", "evaluation.videos=0",
        "evaluation.quality_videos=1", "calibration.videos=2", "calibration.steps=3",
        f"calibration.cache={tmp_path / 'statistics'}", f"data.cache={tmp_path / 'cache'}", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_prompts_are_enough(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, variant = MODELS[name]
    folder = make(tmp_path / "model", variant)
    run_dir = tmp_path / "run"
    given = keys(name, folder, tmp_path, "init=smoothquant", "calibration.prompts=[a dog,two boats]")
    assert main(["ptq", *given, f"run_dir={run_dir}", "dry_run=true"]) == 0
    plan = capsys.readouterr().out
    assert "abs_max, inputs from 2 videos of 3 steps, 2 prompts" in plan
    assert "4 inputs of the full-precision model's own sampling (no data.path)" in plan
    assert main(["ptq", *given, f"run_dir={run_dir}"]) == 0
    report = json.loads((run_dir / "report.json").read_text())
    error, on = report["relative_error"], report["relative_error_measured_on"]
    assert 0 < error["ptq"] < 3 * error["rtn"] < 3  # random weights have no outliers to smooth
    assert error["ptq"] == error["qat"] == pytest.approx(error["packed"], rel=1e-3)
    assert report["packed_codes_equal"] is True
    assert 4 <= on["num_samples"] <= 6
    assert on["split"].startswith("no clips: inputs of the full-precision model in ")
    assert on["split"] in (run_dir / "report.html").read_text()
    assert "no clips" in capsys.readouterr().out
    assert len(packed_layers(load_packed(run_dir / "packed"))) == len(report["layers_quantized"])
    assert not (tmp_path / "cache").exists()

    # The reported error is that of the recorded calls, counted here by hand.
    config = load_run(run_dir)
    teacher, packed = config.model.load_teacher(), load_packed(run_dir / "packed")
    inputs = SampledInputs(
        sampled_teacher(config, teacher, encode=EncodedCaptions(config.model)),
        prompts=evaluation_prompts(config.evaluation, config.model),
        num_samples=config.evaluation.samples,
        num_steps=config.calibration.steps,
    )
    wrong = size = 0.0
    with torch.no_grad():
        for arguments, named in inputs._calls:
            exact = teacher(*arguments, **named)[0].double()
            wrong += float((packed(*arguments, **named)[0].double() - exact).square().sum())
            size += float(exact.square().sum())
    assert wrong / size == pytest.approx(error["packed"], rel=1e-6)
    times = {float(call[1]["timestep"].flatten()[0]) for call in inputs._calls}
    assert len(times) > 1 or name == "wan2.2-a14b"  # several noise levels; an expert sees one of three steps


def test_prompts_of_a_file_are_those_of_a_list_and_clips_change_no_weight(tmp_path: Path) -> None:
    folder = make_wan_folder(tmp_path / "model")
    file = tmp_path / "prompts.txt"
    file.write_text("a dog\n\n  two boats \n", encoding="utf-8")
    common = keys("wan", folder, tmp_path, "init=smoothquant")
    clips = write_clips(tmp_path / "clips", fps=16)
    unmeasured = "evaluation.samples=0"
    runs = {
        "list": ["calibration.prompts=[a dog,two boats]", unmeasured],
        "file": [f"calibration.prompts={file}", unmeasured],
        "on_clips": [f"calibration.prompts={file}", f"data.path={clips}"],
        "none": [unmeasured],
    }
    for name, more in runs.items():
        assert main(["ptq", *common, *more, f"run_dir={tmp_path / name}"]) == 0
    assert packed_bytes(tmp_path / "list") == packed_bytes(tmp_path / "file") == packed_bytes(tmp_path / "on_clips")
    assert packed_bytes(tmp_path / "none") != packed_bytes(tmp_path / "list")  # the model's own prompts are others
    report = json.loads((tmp_path / "on_clips" / "report.json").read_text())
    assert report["relative_error_measured_on"]["split"] == "held_out"
    assert len(list((tmp_path / "statistics").iterdir())) == 2  # list and file share a key
    # Training starts from the same statistics.
    config = load_run(tmp_path / "file")
    teacher = config.model.load_teacher()
    found = calibrated_model(config, teacher=teacher, encode=lambda captions: {}, num_bands=50)
    assert found.folder.is_dir()


def test_a_data_free_method_needs_weights_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_wan_folder(tmp_path / "model")
    measured = keys("wan", folder, tmp_path, "init=dvd_quant")
    assert main(["ptq", *measured, f"run_dir={tmp_path / 'measured'}"]) == 0
    for part in ("text_encoder", "tokenizer", "vae"):
        for file in (folder / part).glob("*"):
            if file.name != "config.json":
                file.unlink()
    capsys.readouterr()
    assert main(["ptq", *measured, f"run_dir={tmp_path / 'refused'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "init=dvd_quant itself needs none of it: write evaluation.samples=0" in line
    assert not (tmp_path / "refused").exists()
    assert main(["ptq", *measured, "evaluation.samples=0", f"run_dir={tmp_path / 'plan'}", "dry_run=true"]) == 0
    assert "measured on: nothing (evaluation.samples=0): no errors, no videos" in capsys.readouterr().out
    assert main(["ptq", *measured, "evaluation.samples=0", f"run_dir={tmp_path / 'run'}"]) == 0
    assert "measured: nothing: evaluation.samples=0" in capsys.readouterr().out
    assert packed_bytes(tmp_path / "run") == packed_bytes(tmp_path / "measured")
    report, full = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("run", "measured"))
    assert report["relative_error"] == dict.fromkeys(("rtn", "ptq", "qat", "packed"))
    for key in (
        "model",
        "bits",
        "init",
        "layers_quantized",
        "layers_skipped",
        "bytes",
        "packed_codes_equal",
        "num_codes",
    ):
        assert report[key] == full[key], key
    assert not (tmp_path / "run" / "report.html").exists()
    assert not list((tmp_path / "run").rglob("*.mp4"))
    assert main(["ptq", *measured, "evaluation.samples=0", f"run_dir={tmp_path / 'run'}", "resume=true"]) == 0
    shutil.rmtree(folder / "transformer")
    assert main(["ptq", *measured, "evaluation.samples=0", f"run_dir={tmp_path / 'refused'}"]) == 2


def test_what_can_not_be_done_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_wan_folder(tmp_path / "model")
    empty, binary = tmp_path / "empty.txt", tmp_path / "clip.mp4"
    empty.write_text("\n \n")
    binary.write_bytes(b"\xff\xfe\x00\x81")
    for verb, more, message in (
        ("ptq", ("init=gptq", f"calibration.prompts={tmp_path}/absent.txt"), "absent.txt can't be read as a text file"),
        ("ptq", ("init=gptq", "calibration.prompts=prompt"), "calibration.prompts=prompt can't be read as a text file"),
        ("ptq", ("init=gptq", f"calibration.prompts={empty}"), "empty.txt holds no caption; write one to a line"),
        ("ptq", ("init=gptq", f"calibration.prompts={binary}"), "clip.mp4 can't be read as a text file"),
        ("ptq", ("calibration.prompts=[]",), "calibration.prompts=[] is empty"),
        ("ptq", ("calibration.prompts=['a dog','']",), "calibration.prompts[1] is an empty caption"),
        ("ptq", ("evaluation.samples=-1",), "evaluation.samples=-1 is negative"),
        ("train", ("steps=4", "evaluation.samples=0"), "only qvgen ptq can leave measuring out"),
        ("train", ("steps=4", "batch_size=2", "phi.ranks=[2]"), "data.path is missing"),
    ):
        given = keys("wan", folder, tmp_path, *more, f"run_dir={tmp_path / 'run'}")
        assert main([verb, *given]) == 2, message
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
