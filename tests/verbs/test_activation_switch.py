"""activation_switch: one checkpoint whose activations switch widths while sampling, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qvgen.cli import main
from qvgen.deploy.checkpoint import load_packed
from qvgen.deploy.delta_switch import find_switch
from tests.runs import SHORT, copy_until, packed_bytes, shallow, train

SWITCH = ("bits=w4a4", "activation_switch.widths=[4,8]", "activation_switch.delta=0.3")


def test_a_ptq_checkpoint_switches_and_says_how_often(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [*(key for key in SHORT if not key.startswith(("steps", "phi", "model.num"))), *shallow(2)]
    steps = "model.num_inference_steps=8"
    assert main(["ptq", *keys, *SWITCH, steps, "init=dvd_quant", f"run_dir={tmp_path / 'run'}"]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    variants = report["quality"]["variants"]
    mean = variants["packed"]["activation_bits"]
    assert 4 < mean < 8
    assert variants["fake-quantized"]["activation_bits"] == mean
    assert variants["teacher"]["activation_bits"] is None
    assert report["packed_codes_equal"] is True
    assert report["trajectory_psnr_db"] == "inf"
    assert "<th>Activation bits</th>" in (tmp_path / "run" / "report.html").read_text()

    packed = tmp_path / "run" / "packed"
    assert find_switch(load_packed(packed)).config.delta == 0.3
    generate = [
        "generate",
        f"packed={packed}",
        "prompt=a red three moving left",
        "num_steps=8",
        f"out={tmp_path / 'v'}",
        "overwrite=true",
    ]
    found = []
    for extra in ((), ("delta=0",), ("delta=1000",)):
        capsys.readouterr()
        assert main([*generate, *extra]) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.startswith("mean activation bits: ")
        found.append(float(line.split()[3]))
    assert found[1] == 8.0
    assert found[2] == pytest.approx((2 * 8 + 6 * 4) / 8)
    assert found[2] <= found[0] <= 8


QUICK = (
    "phi.ranks=[2]", "steps=4", "evaluation.samples=2", "evaluation.videos=0", "evaluation.start_videos=false",
    "calibration.videos=1", "model.num_inference_steps=4", *shallow(1),
)  # fmt: skip
STARTS = {
    "switch": (*SWITCH, "checkpoint.every_steps=2"),
    "static": ("bits=8", "init=static", "init.alpha=0.5", "steps=2"),
    "svdquant": ("bits=4", "init=svdquant", "init.rank=8", "steps=2"),
}


@pytest.fixture(scope="module")
def switched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of one process that sees both widths, with a checkpoint half-way."""
    folder = tmp_path_factory.mktemp("switched")
    assert train(folder / "one", *QUICK, *STARTS["switch"], f"calibration.cache={folder / 'cache'}") == 0
    return folder / "one"


def test_training_sees_both_widths_and_resumes_bit_for_bit(switched: Path, tmp_path: Path) -> None:
    copy_until(switched, tmp_path / "again", step=2)
    cache = f"calibration.cache={switched.parent / 'cache'}"
    assert train(tmp_path / "again", *QUICK, *STARTS["switch"], cache, "resume=true") == 0
    assert packed_bytes(tmp_path / "again") == packed_bytes(switched)
    layer = load_packed(switched / "packed").get_submodule("proj_out")
    for table in (layer.clip_high, layer.clip_high_8):  # both were trained: no longer one value in all bands
        assert len(set(table.tolist())) > 1


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_processes_that_meet_other_widths_train_the_same_bits(strategy: str, switched: Path, tmp_path: Path) -> None:
    """With all of the model on each of two processes, and with shares of it: what one process trains."""
    keys = (*QUICK, *STARTS["switch"], f"calibration.cache={switched.parent / 'cache'}")
    assert train(tmp_path / "two", *keys, "devices=2", f"strategy={strategy}") == 0
    assert packed_bytes(tmp_path / "two") == packed_bytes(switched)


@pytest.mark.parametrize("start", ["static", "svdquant"])
def test_processes_that_share_a_calibrated_model_train_the_same_bits(start: str, tmp_path: Path) -> None:
    keys = (*QUICK, *STARTS[start], f"calibration.cache={tmp_path / 'cache'}")
    assert train(tmp_path / "one", *keys) == 0
    assert train(tmp_path / "two", *keys, "devices=2", "strategy=fsdp") == 0
    assert packed_bytes(tmp_path / "two") == packed_bytes(tmp_path / "one")


def test_what_makes_no_sense_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for keys, message in (
        (("bits=w4a6", "activation_switch.widths=[4,8]"), "lacks the 6 activation bits of bits=w4a6"),
        (("bits=w4a4", "activation_switch.widths=[8,4]"), "must be two rising widths"),
        ((*SWITCH, "activation_switch.delta=-1"), "activation_switch.delta=-1.0 is negative"),
        ((*SWITCH, "init=static"), "init=static has one table of scales"),
    ):
        assert train(tmp_path / "run", *keys) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
