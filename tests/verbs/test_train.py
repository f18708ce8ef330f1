"""`qvgen train` on the real tiny model, the whole way: every variant, and what a run leaves behind."""

from __future__ import annotations

import json
import math
from collections.abc import Set
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qvgen.cli import DONE, main
from qvgen.deploy.checkpoint import load_packed
from qvgen.layers.swap import packed_layers
from qvgen.models.weight_file import save_weights
from qvgen.training.tracking.report_panels import flat_numbers
from qvgen.training.whole_run import trained
from qvgen.verbs._parts import training_output, training_run
from qvgen.verbs.benchmarks.base import cpu_kernel
from tests.runs import SHORT, read_metrics, shallow, train, train_config
from tests.training.tracking.dashboard_checks import check_every_section
from tests.training.tracking.wandb_records import history, read_records, run_record, summary

KEYS = {
    "model", "bits", "profile", "method", "init", "seed", "steps", "layers_quantized", "layers_skipped",
    "relative_error", "packed_codes_equal", "packed_vs_fake_max_abs", "bytes", "seconds", "phi_rank_final", "versions",
    "git_sha",
}  # fmt: skip
"""What report.json promises."""

BLOCKS = 3
LAYERS_OUTSIDE, LAYERS_OF_BLOCK = 6, 10
WEIGHTS_OUTSIDE, WEIGHTS_OF_BLOCK = 44_032, 49_152

VARIANTS: dict[str, dict[str, Any]] = {
    "method=lsq bits=w4a8": {"method": "lsq", "bits": "w4a8", "weight_bits": 4, "activation_bits": 8},
    "method=kd init=gptq calibration.videos=2 calibration.steps=2 profile=int8 bits=w3a8": {
        "method": "kd", "init": "gptq", "profile": "int8", "bits": "w3a8",
    },
    "init=rtn seed=1 bits=2 phi.rank=8": {"init": "rtn", "seed": 1, "bits": "2"},
    "phi.ranks=[6,2] phi.anneal=step phi.drop=random phi.start=random phi.input=full optim.gradient_clip=null": {},
    "profile=convrot bits=w3a4": {"profile": "convrot", "bits": "w3a4"},
    "profile=svdq_g64 bits=4": {"profile": "svdq_g64", "bits": "4"},
    "profile.weight.zero_point=real model.exclude=[proj_out,condition_embedder.*]": {"profile": "paper"},
}  # fmt: skip
"""Overrides -> what the report says of them."""

QUICK = ("steps=5", "accumulate=1", "evaluation.start_videos=false")
"""For a variant, in one process: each phase of Phi has a step. Other settings are those of the run that is kept whole."""

INEXACT = ("profile=svdq_g64 bits=4",)
"""Where a scale can't leave the sum, so that float32 rounding differs between training and packed."""


def read_report(run_dir: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    return report


VIDEOS = {"teacher.mp4", "ptq-start.mp4", "fake-quantized.mp4", "packed.mp4"}
"""What a run samples with one prompt and seed."""


def check_run(
    run_dir: Path, *, exact: bool, expected: dict[str, Any], blocks: int = BLOCKS, videos: Set[str] = VIDEOS
) -> dict[str, Any]:
    """Assert what holds for every run of a model with so many blocks; returns the report."""
    report = read_report(run_dir)
    assert set(report) >= KEYS
    for key, value in (
        {"model": "tiny", "profile": "paper", "init": "mse", "seed": 42, "bits": "3"} | expected
    ).items():
        assert report[key] == value, key
    assert report["packed_codes_equal"] is True
    assert report["phi_rank_final"] == 0
    assert float(report["trajectory_psnr_db"]) >= 50
    if exact:
        assert report["packed_vs_fake_max_abs"] == 0.0
        assert report["flipped_codes"]["flipped"] == 0
    assert set(report["relative_error"]) >= {"ptq", "qat", "packed"}
    assert all(0 < report["relative_error"][name] < 10 for name in ("rtn", "ptq", "qat", "packed"))
    assert report["relative_error"]["packed"] == pytest.approx(
        report["relative_error"]["qat"], rel=0 if exact else 1e-2
    )
    assert set(report["seconds"]) >= {"init", "train", "fold", "generate"}
    assert all(value > 0 for value in report["seconds"].values())
    packed = run_dir / "packed" / "model.safetensors"
    assert report["bytes"]["packed"] == packed.stat().st_size < report["bytes"]["bf16"]
    quantized, skipped = report["layers_quantized"], report["layers_skipped"]
    assert len(quantized) + len(skipped) == LAYERS_OUTSIDE + blocks * LAYERS_OF_BLOCK
    assert quantized == list(packed_layers(load_packed(run_dir / "packed")))
    assert all(math.isfinite(float(row["train/loss"])) for row in read_metrics(run_dir))
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["names"]["model"] == "tiny"
    names = {path.name.rpartition("-seed")[2].partition("-")[2] for path in (run_dir / "videos").iterdir()}
    assert names == videos
    assert (run_dir / "report.html").stat().st_size > 100_000  # the videos are inside
    return report


@pytest.mark.parametrize("overrides", VARIANTS)
def test_every_variant_goes_the_whole_way(overrides: str, tmp_path: Path) -> None:
    """On the first block of the model, which has a layer of every kind; all blocks where most of the weights are skipped."""
    blocks = BLOCKS if "exclude" in overrides else 1
    run_dir = tmp_path / "run"
    assert train(run_dir, *QUICK, *shallow(blocks), *overrides.split()) == DONE
    videos = VIDEOS - {"ptq-start.mp4"}
    report = check_run(
        run_dir, exact=overrides not in INEXACT, expected=VARIANTS[overrides], blocks=blocks, videos=videos
    )
    assert report["steps"] == len(read_metrics(run_dir)) == 5
    if "exclude" in overrides:
        assert "proj_out" in report["layers_skipped"]
        assert len(report["layers_quantized"]) == BLOCKS * LAYERS_OF_BLOCK
        assert {layer["reason"] for layer in report["skipped"]} == {"excluded by the model's patterns"}
    else:
        assert report["layers_skipped"] == []
        assert report["num_codes"] == WEIGHTS_OUTSIDE + WEIGHTS_OF_BLOCK


def test_a_finished_run_has_all_that_is_promised(short_run: Path) -> None:
    report = check_run(short_run, exact=True, expected={"method": "qvgen"})
    # 3 bits are 0.375 bytes; the bound is the format's, on these narrow layers biases and clips come on top
    weights = sum(
        value.numel() * value.element_size()
        for layer in packed_layers(load_packed(short_run / "packed")).values()
        for name, value in layer.state_dict().items()
        if name in ("codes", "codes_high")
    )
    assert weights == (WEIGHTS_OUTSIDE + BLOCKS * WEIGHTS_OF_BLOCK) * 3 // 8
    assert sum(layer["bytes"] for layer in report["layers"]) < report["bytes"]["packed"]


def test_more_bits_have_less_error(short_run: Path, tmp_path: Path) -> None:
    keys = [key for key in SHORT if not key.startswith(("steps", "phi"))]
    assert main(["ptq", *keys, "init=mse", "bits=w8a8", "evaluation.videos=0", f"run_dir={tmp_path / 'run'}"]) == DONE
    assert (
        read_report(tmp_path / "run")["relative_error"]["ptq"] < 0.1 * read_report(short_run)["relative_error"]["ptq"]
    )


def test_a_sweep_makes_a_run_for_each_value_and_a_wandb_run_in_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = f"run_dir={tmp_path}/w${{bits}}"
    videos = ("evaluation.videos=1", "evaluation.video_every_steps=4", "accumulate=1", "evaluation.samples=2")
    assert main(["train", "-m", *SHORT, *shallow(1), *videos, "steps=5", "bits=4,3", "logger=wandb", folder]) == DONE
    groups = set()
    for bits in ("4", "3"):
        run_dir = tmp_path / f"w{bits}"
        check_run(run_dir, exact=True, expected={"bits": bits}, blocks=1)
        (offline,) = (run_dir / "wandb").glob("offline-run-*")
        (record,) = offline.glob("*.wandb")
        assert record.stat().st_size > 0
        records = read_records(offline)
        assert [row["_step"] for row in history(records) if "train/loss" in row] == list(range(5))
        check_every_section(records, offline / "files" / "media", report=read_report(run_dir))
        groups.add(run_record(records).run_group)
        numbers = {key: value for key, value in summary(records).items() if key.startswith("report/")}
        report = read_report(run_dir)
        assert numbers["report/relative_error/qat"] == report["relative_error"]["qat"]
        assert numbers["report/packed_codes_equal"] is True
        assert numbers.keys() == flat_numbers(report).keys()
    (group,) = groups
    assert group.startswith("sweep ")


def test_held_out_error_while_training_is_the_one_at_the_end(tmp_path: Path) -> None:
    keys = (
        "steps=4",
        "phi.ranks=[2]",
        "evaluation.every_steps=3",
        "evaluation.videos=0",
        "evaluation.start_videos=false",
        *shallow(1),
    )
    assert train(tmp_path / "run", *keys) == DONE
    errors = [row["val/relative_error"] for row in read_metrics(tmp_path / "run")]
    assert [bool(error) for error in errors] == [False, False, True, True]
    assert float(errors[-1]) == read_report(tmp_path / "run")["relative_error"]["qat"]


def test_a_model_that_was_pretrained_can_be_quantized(tmp_path: Path) -> None:
    config = train_config("experiment=tiny_teacher", "devices=1", "strategy=single", "steps=2", "batch_size=4")
    student = config.model.initial_transformer(config.seed)
    before = student.proj_out.weight.detach().clone()
    run, output = training_run(config), training_output(config, tmp_path)
    with trained(run, output, student=student, teacher=None, settings=config.plain) as steps:
        assert steps == 2
    assert not torch.equal(student.proj_out.weight, before)
    assert all(float(row["train/loss"]) > 0 and row["phi/rank"] == "" for row in read_metrics(tmp_path))
    weights = save_weights(student.state_dict(), tmp_path / "mine.safetensors", card={"seed": config.seed})
    assert train(tmp_path / "run", f"model.weights={weights}", "dry_run=true") == DONE


def test_a_dry_run_shows_the_plan_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", "dry_run=true") == DONE
    assert list(tmp_path.iterdir()) == []
    shown = capsys.readouterr().out
    assert "quantized: 36 Linears" in shown
    assert "4 from step 0, 2 from step 3, 1 from step 6, 0 from step 10" in shown
    assert "fits: " in shown
    assert f"packed model, on this machine: kernel=auto on cpu: {cpu_kernel()}" in shown
