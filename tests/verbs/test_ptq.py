"""`qvgen ptq`: every method of conf/init alone, and that training starts from the very same model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qvgen.cli import main
from qvgen.config import TrainConfig
from qvgen.config.leaves import leaf_names, load_leaf
from qvgen.deploy.checkpoint import load_packed
from qvgen.evaluation.held_out import HeldOut
from qvgen.layers.swap import packed_layers, phi_suspended, quantized_layers
from qvgen.run_directory import RunDirectory
from qvgen.training.start.file import load_start
from qvgen.training.start.student import Measured, fold_student, start_student
from qvgen.verbs._inputs import open_inputs
from qvgen.verbs._parts import named_family, packed_record, ptq_method, sampled_teacher, student_design
from tests.parts import prepared
from tests.runs import SHORT, UNSEEN, copy_until, packed_bytes, shallow, train, train_config

INITIALIZERS = leaf_names("init")


QUICK = {"vidit_q_mp": ("init.visual=ssim", "init.videos=1", "init.steps=1", "init.windows=1", "init.candidates=[4,8]")}
"""Settings of a method that would take minutes, or needs a network."""

WHOLE_WAY = "dvd_quant"
"""The method whose start is trained and delivered here too. Others: tests/verbs/test_static.py (static),
test_activation_switch.py (svdquant), test_mixed_precision.py (vidit_q_mp), below (vidit_q, smoothquant), test_train.py
(mse, rtn)."""


def ptq(run_dir: Path, *overrides: str) -> int:
    keys = [key for key in SHORT if not key.startswith(("steps", "phi"))]
    return main(
        ["ptq", *keys, "calibration.videos=2", "calibration.steps=3", f"run_dir={run_dir}", *UNSEEN, *overrides]
    )


@pytest.mark.parametrize("name", INITIALIZERS)
def test_a_method_alone_and_as_the_start_of_training(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    common = (f"init={name}", f"calibration.cache={tmp_path / 'cache'}", "bits=w4a6", *shallow(1), *QUICK.get(name, ()))
    assert ptq(tmp_path / "ptq", *common) == 0
    report = json.loads((tmp_path / "ptq" / "report.json").read_text())
    assert (report["init"], report["method"], report["steps"], report["phi_rank_final"]) == (name, "ptq", 0, 0)
    assert report["packed_codes_equal"] is True
    assert report["packed_vs_fake_max_abs"] == 0.0
    error = report["relative_error"]
    assert error["ptq"] == error["qat"] == error["packed"]
    worst = 3.0 if name == "static" else 1.2  # round to nearest has a scale of its own for each token
    assert 0 < error["packed"] < worst * error["rtn"]
    sampled = sum(message.startswith("calibration:") for message in caplog.messages)
    assert sampled == bool(load_leaf("init", name).needs)

    caplog.clear()
    calibration = ("calibration.videos=2", "calibration.steps=3")
    keys = (*common, *calibration, "steps=4", "phi.ranks=[2]", "evaluation.videos=0", f"run_dir={tmp_path / 'run'}")
    config = train_config(*keys)
    if name == WHOLE_WAY:
        assert train(tmp_path / "run", *keys) == 0
    else:
        write_start(config)
    assert not any(message.startswith("calibration:") for message in caplog.messages)  # it is in the cache
    student, _ = prepared(config)
    load_start(student, tmp_path / "run")
    packed = load_packed(tmp_path / "ptq" / "packed")
    split = config.data.open(config.model, split="held_out")
    held_out = HeldOut(config.model, split, num_samples=3, batch_size=2)
    with phi_suspended(student):
        outputs = [list(held_out.predictions(model)) for model in (student, packed)]
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))
    with_phi = list(held_out.predictions(student))
    assert not torch.equal(with_phi[0], outputs[0][0])
    exact = list(held_out.predictions(config.model.load_teacher()))
    assert distance(with_phi, exact) < distance(outputs[0], exact)  # Phi starts from this method's own loss
    assert all(layer.phi is not None for layer in quantized_layers(student).values())
    for layer in quantized_layers(student).values():
        layer.phi = None
    # What training starts from is the checkpoint without training.
    fold_student(student, tmp_path / "folded", model=named_family(config), training=packed_record(config, steps=0))
    assert (tmp_path / "folded" / "model.safetensors").read_bytes() == packed_bytes(tmp_path / "ptq")


def write_start(config: TrainConfig) -> None:
    """What the verb does before it trains."""
    student, _ = prepared(config)
    teacher = config.model.load_teacher()
    held_out = open_inputs(config)(teacher)
    measured = Measured(inputs=held_out, reference=list(held_out.predictions(teacher)))
    with RunDirectory.claim(config.run_dir, config.plain, resume=False) as run_dir:
        start_student(
            run_dir,
            student,
            design=student_design(config),
            ptq=ptq_method(config),
            teacher=sampled_teacher(config, teacher, encode=held_out.split.encode),
            measured=measured,
        )


def distance(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(found, wanted, strict=True)))


def test_one_process_and_two_start_alike_from_a_calibrated_method(tmp_path: Path) -> None:
    common = ("init=vidit_q", f"calibration.cache={tmp_path / 'cache'}", "calibration.videos=1", "calibration.steps=2")
    common += ("steps=2", "phi.ranks=[2]", "evaluation.videos=0", "evaluation.start_videos=false", *shallow(1))
    runs = {"one": (), "two": ("devices=2", "strategy=ddp")}
    for name, keys in runs.items():
        assert train(tmp_path / name, *common, *keys) == 0
    assert packed_bytes(tmp_path / "one") == packed_bytes(tmp_path / "two")
    layers = packed_layers(load_packed(tmp_path / "one" / "packed"))
    assert all(layer.profile.rotation for layer in layers.values())
    folded_ends = ("attn1.to_out.0", "attn2.to_out.0", "attn2.to_q")  # qvgen.models.wan_fold
    assert all((layer.input_scale is None) == name.endswith(folded_ends) for name, layer in layers.items())
    folded = tmp_path / "again"
    assert main(["fold", f"run_dir={tmp_path / 'one'}", f"out={folded}"]) == 0
    assert (folded / "model.safetensors").read_bytes() == packed_bytes(tmp_path / "one")


def test_a_smoothed_start_trains_and_resumes_with_its_folds_and_without(tmp_path: Path) -> None:
    """The scaled norms and values are in checkpoints and in the packed file; only the option decides whether they are."""
    common = (
        "init=smoothquant", f"calibration.cache={tmp_path / 'cache'}", "calibration.videos=1", "calibration.steps=2",
        "bits=4", "evaluation.videos=0", "evaluation.start_videos=false", "checkpoint.every_steps=2", "phi.ranks=[2]",
        "steps=4", "accumulate=1", *shallow(1),
    )  # fmt: skip
    norm, value = "blocks.0.norm2.weight", "blocks.0.attn1.to_v.bias"
    teacher = train_config(*shallow(1)).model.load_teacher().state_dict()
    errors = {}
    for folding in (True, False):
        first, again = tmp_path / f"first-{folding}", tmp_path / f"again-{folding}"
        keys = (*common, f"init.fold_smoothing={folding}".lower())
        assert train(first, *keys) == 0
        copy_until(first, again, step=2)
        assert train(again, *keys, "resume=true") == 0
        assert packed_bytes(again) == packed_bytes(first)
        errors[folding] = json.loads((first / "report.json").read_text())["relative_error"]
        start = load_file(first / "start.safetensors")
        for name in (norm, value):
            assert torch.equal(start[name], teacher[name]) != folding
        packed = load_packed(first / "packed")
        assert (packed.get_submodule("blocks.0.attn2.to_q").input_scale is None) == folding
        assert packed.get_submodule("blocks.0.attn1.to_q").input_scale is not None
    assert errors[True]["ptq"] < 1.1 * errors[False]["ptq"]


def test_what_makes_no_sense_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for keys, message in (
        (("steps=10",), "qvgen ptq trains nothing"),
        (("method=lsq",), "method=ptq alone trains nothing"),
        (("init=smoothquant", "init.alpha=2"), "init.alpha=2 is outside [0, 1]"),
        (("init=gptq", "init.damping=0"), "init.damping=0 must be greater than 0"),
        (("calibration.videos=0",), "calibration.videos=0 must be greater than 0"),
    ):
        assert ptq(tmp_path / "run", *keys) == 2
        assert message in capsys.readouterr().err
    assert train(tmp_path / "run", "method=ptq") == 2
    assert "use qvgen ptq" in capsys.readouterr().err
    assert train(tmp_path / "run", "steps=0") == 2
    assert not (tmp_path / "run").exists()
    assert ptq(tmp_path / "run", "init=gptq", "dry_run=true") == 0
    assert "calibration: inputs, second_moment from 2 videos of 3 steps" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
