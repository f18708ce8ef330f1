"""Bad input: exit code 2, one line on stderr that names the value, nothing written; checked through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.models.tiny import TinyVideoDiT
from qvgen.models.weight_file import ASSETS_DIRECTORY
from tests.runs import copy_until, load_state, snapshot, train

ZERO = "devices=2 strategy=deepspeed"
LOW = "devices=2 strategy=fsdp strategy.low_host_memory=true"


def only_line(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> str:
    """What a user sees: the one line on stderr. Log records would stand beside it."""
    shown = capsys.readouterr()
    assert shown.out == ""
    assert caplog.messages == []
    (line,) = shown.err.splitlines()
    return line


@pytest.fixture(autouse=True)
def all_log_records(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bits=1", "bits=1 is outside 2..8"),
        ("bits=9", "bits=9 is outside 2..8"),
        ("bits=w4a9", "bits=w4a9 is outside 2..8"),
        ("bits=w4x3", "bits=w4x3 is neither 2..8 nor wXaY"),
        ("phi.rank=0", "phi.rank=0 must be greater than 0"),
        ("phi.rank=-2", "phi.rank=-2 must be greater than 0"),
        ("phi.rank=64", "proj_out: phi.rank=64 is outside 1..48 for a Linear 64 -> 48"),
        ("phi.ranks=[64,2]", "proj_out: phi.rank=64 is outside 1..48"),
        ("phi.ranks=[8,8]", "phi.ranks=[8,8] must be positive and strictly decreasing"),
        ("phi.ranks=[4,8]", "phi.ranks=[4,8] must be positive and strictly decreasing"),
        ("phi.ranks=[4,0]", "phi.ranks=[4,0] must be positive"),
        ("steps=3", "steps=3 with phi.tail_share=0.1 leave 2 steps for 3 phases"),
        ("model.include=[block.*]", "include pattern 'block.*' matches none of the 36 Linears"),
        ("model.exclude=[proj_uot]", "exclude pattern 'proj_uot' matches none of the 36 Linears"),
        ("model.exclude=['*']", "leave no Linear to quantize"),
        ("profile.weight.group_size=48 profile.weight.granularity=per_group", "group_size=48"),
        ("profile=convrot profile.rotation=52", "rotation=52 has no Hadamard matrix"),
        (
            "profile=convrot bits=4 profile.rotation=64",
            "computes with rotation=('regular', 256, 64), not ('sylvester', 64)",
        ),
        ("profile=int8 bits=8 profile.activation.clip=true", "computes with activation.clip=False, not True; leave"),
        ("profile=svdq_g64 bits=4 profile.weight.scale_dtype=float32", "weight.scale_dtype=bfloat16, not float32"),
        ("profile.rotation={kind:regular}", "rotation={'kind': 'regular'} is no size"),
        (
            "profile=int8 bits=4",
            "in 8 bits, with weights of 2 or 3 or 4 or 5 or 6 or 7 or 8 and inputs of 8 bits, not bits=w4a4; choose "
            "profile=convrot or paper or svdq_g64, or change bits (profile.runtime=null keeps the grid",
        ),
        ("profile=svdq_g64 bits=w4a8", "not bits=w4a8; choose profile=convrot or int8 or paper or w4a8_row, or"),
        ("profile=convrot bits=3", "inputs of 4 or 8 bits, not bits=w3a3; choose profile=paper, or change bits"),
        (
            "profile=convrot bits=4 init=vidit_q",
            "ComfyUI (comfy-kitchen), and init=vidit_q rotates whole rows, which that does not have; choose profile=paper,",
        ),
        (
            "profile=convrot bits=4 init=svdquant",
            "init=svdquant adds a low-rank branch, which that does not have; choose profile=paper or svdq_g64",
        ),
        ("profile.runtime={name:x,weight_bits:[9],activation_bits:[4]}", "weight_bits=9"),
        ("kernel=fast", "kernel='fast' is unknown"),
        (
            "strategy.low_host_memory=true",
            "strategy.low_host_memory=true is of strategies that share a model out, fsdp and",
        ),
        (f"{LOW} init=svdquant", "no whole model on a host, and init=svdquant samples the full-precision model; write"),
        (
            f"{LOW} method=efficientdm",
            "the training method starts from the whole student; write method=qvgen, kd or lsq",
        ),
        (
            f"{LOW} method=pretrain",
            "no whole model on a host, and method=pretrain begins with a whole model; leave the key",
        ),
        (
            f"{LOW} method=lsq evaluation.every_steps=2 evaluation.video_every_steps=null",
            "evaluation.every_steps compares with the full-precision model, which method=lsq trains without; leave that",
        ),
        (f"{LOW} export=diffusers", "the run ends with a checkpoint, and qvgen fold packs it; leave it out"),
        ("strategy=deepspeed", "devices=1; write devices=8 strategy=deepspeed for example, or strategy=single"),
        (ZERO, "is for GPUs, and there is none here; write strategy=ddp or strategy=fsdp"),
        (f"{ZERO} strategy.stage=3", "unknown key 'strategy.stage'"),
        (f"{ZERO} strategy.cpu_offload=true", "is of strategies that share a model out, fsdp and hsdp"),
        (f"{ZERO} optim.offload=true", "leave it out, or write strategy=fsdp strategy.cpu_offload=true"),
        (f"{ZERO} optim.masters=bfloat16", "which shares out float32 masters and gradients; leave it out"),
        (f"{ZERO} optim.name=adamw_8bit", "steps flat pieces of many tensors; write optim.name=adamw"),
        (f"{ZERO} strategy.context_parallel=2", "strategy.context_parallel=2 and strategy=deepspeed: not built"),
        (f"{ZERO} strategy.compile=true", "strategy.compile=true and strategy=deepspeed: not built"),
        (f"{ZERO} trainer.precision=bf16-mixed", "leave them out, or write strategy=ddp"),
        ("evaluation.prompts=[a\\ purple\\ cow]", "caption 'a purple cow' is no 'a COLOR DIGIT MOTION'"),
        ("batch_size=30000", "batch_size=30000 is larger than the training data of 20000"),
        ("data.num_frames=4", "data=moving_digits has videos of shape (3, 4, 16, 16), model=tiny takes (3, 8, 16, 16)"),
        ("model.width=63", "width=63 is no multiple of 8"),
        ("method.caption_dropout=2", "caption_dropout=2 is outside [0, 1]"),
        (
            "bits=3 profile.weight_bits=8",
            "have 8 bits for weights and 3 for activations, and bits=3; widths are chosen by bits",
        ),
        ("bits=w4a8 profile.activation_bits=4", "write bits=4"),
        (
            "profile=int8 bits=8 optim.zero_point_gradient=stop",
            "zero_point_gradient=stop says nothing with profile=int8, whose activations have no zero point; leave it out",
        ),
        (
            "method=lsq loss.feature_weight=0.5",
            "loss.feature_weight=0.5 compares blocks with the full-precision model's, which method=lsq has no use for",
        ),
        (
            "loss.feature_weight=1 loss.feature_blocks=[1,3]",
            "feature_blocks holds 3, and the model has 3 blocks; write",
        ),
        ("loss.levels=logit_normal loss.level_mean=90", "loss.level_mean=90.0 is outside [-10, 10]; write for example"),
        ("loss.weighting=minsnr", "loss.weighting=minsnr is unknown; did you mean 'min_snr'"),
        ("loss.gamma=5", "unknown key 'loss.gamma'"),
        (
            "method=autoencoder loss.weighting=min_snr",
            "method=autoencoder trains a VAE, which sees no noise levels; leave",
        ),
        (
            "optim.tail_share=0.95",
            "tail_share=0.95 begins before optim.warmup_share=0.1 ends; write optim.tail_share=0.9",
        ),
    ],
)
def test_a_bad_value_makes_no_folder(
    override: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    overrides = [text.replace("\\ ", " ") for text in override.replace("\\ ", "\0").split()]
    overrides = [text.replace("\0", " ") for text in overrides]
    assert train(tmp_path / "runs" / "run", *overrides) == BAD_INPUT
    line = only_line(capsys, caplog)
    assert line.startswith("qvgen train: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A copy of the small model's weights and their card."""
    source = ASSETS_DIRECTORY / TinyVideoDiT.teacher_file
    (tmp_path / "weights").mkdir()
    for path in (source, source.with_suffix(".json")):
        shutil.copy(path, tmp_path / "weights")
    return tmp_path / "weights" / TinyVideoDiT.teacher_file


def spoil_byte(weights: Path) -> None:
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "overrides", "message"),
    [
        (lambda w: w.unlink(), (), "can't be read (No such file or directory)"),
        (spoil_byte, (), "are corrupted: sha256 is"),
        (lambda w: w.write_bytes(w.read_bytes()[:1000]), (), "are corrupted: sha256 is"),
        (lambda w: w.with_suffix(".json").unlink(), (), "tiny_teacher.json can't be read"),
        (lambda w: w.with_suffix(".json").write_text("{"), (), "tiny_teacher.json is no JSON"),
        (lambda w: w.with_suffix(".json").write_text("{}"), (), "tiny_teacher.json has no sha256"),
        (lambda w: None, ("model.width=32",), "are of another model"),
        (lambda w: None, ("model.num_layers=2",), "are of another model"),
    ],
)
def test_weights_that_are_missing_damaged_or_of_another_model(
    damage, overrides, message, weights: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    damage(weights)
    run_dir = weights.parents[1] / "run"
    assert train(run_dir, f"model.weights={weights}", *overrides) == BAD_INPUT
    line = only_line(capsys, caplog)
    assert message in line
    assert str(weights.parent) in line
    assert not run_dir.exists()


@pytest.mark.parametrize("verb", ["inspect", "generate"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=7), "has version 7; this qvgen reads version 1"),
        (lambda c: c["base"].update(transformer="os.system"), "transformer class 'os.system' is no model"),
        (lambda c: c.pop("layers"), "lacks 'layers'"),
        (None, "is no JSON"),
    ],
    ids=["version", "class", "layers", "truncated"],
)
def test_a_manifest_that_is_wrong(
    verb, change, message, short_run: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    packed = Path(shutil.copytree(short_run / "packed", tmp_path / "packed"))
    path = packed / "manifest.json"
    if change is None:
        path.write_text(path.read_text()[:500])
    else:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    out = [f"out={tmp_path / 'out'}"] if verb == "generate" else []
    assert main([verb, f"packed={packed}", *out]) == BAD_INPUT
    line = only_line(capsys, caplog)
    assert message in line
    assert str(path) in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("proj_out.codes"), "lacks the tensor 'proj_out.codes'"),
        (lambda t: t.update({"proj_out.bias": t["proj_out.bias"][:3].clone()}), "'proj_out.bias' has shape [3]"),
    ],
    ids=["missing", "shape"],
)
def test_packed_tensors_that_do_not_fit(
    change, message, short_run: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    from tests.deploy.test_checkpoint import edit_tensors

    packed = Path(shutil.copytree(short_run / "packed", tmp_path / "packed"))
    edit_tensors(packed, change)
    assert main(["generate", f"packed={packed}", f"out={tmp_path / 'out'}"]) == BAD_INPUT
    assert message in only_line(capsys, caplog)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("seed=7", "resume=true"), "holds another configuration's run: seed is 42 there and 7 here"),
        (("bits=4",), "holds another configuration's run: bits is 3 there and 4 here"),
        (("optim.learning_rate=1e-4", "resume=true"), "optim.learning_rate is 0.002 there and 0.0001 here"),
        ((), "holds this very run; continue it with resume=true"),
    ],
)
def test_a_folder_that_holds_a_run_is_not_touched(
    overrides: tuple[str, ...],
    message: str,
    short_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run_dir = copy_until(short_run, tmp_path / "run", step=6)
    before = snapshot(run_dir)
    assert train(run_dir, "accumulate=2", *overrides) == BAD_INPUT
    line = only_line(capsys, caplog)
    assert f"run_dir={run_dir} {message}" in line or message in line
    assert snapshot(run_dir) == before


def test_a_folder_of_something_else_is_not_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    assert train(tmp_path) == BAD_INPUT
    assert "is not empty (thesis.tex) and holds no run; choose another" in only_line(capsys, caplog)
    assert snapshot(tmp_path).keys() == {"thesis.tex"}


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A learning rate of 1e30 leaves finite weights after step 0, and nothing finite in step 1.
    run_dir = tmp_path / "run"
    options = ("optim.learning_rate=1e30", "optim.warmup_share=0", "checkpoint.every_steps=1")
    assert train(run_dir, *options) == BAD_INPUT
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("qvgen train: the loss is nan in optimizer step 1; the last checkpoint is kept: ")
    assert sum("qvgen train" in line or "Traceback" in line for line in lines) == 1
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    assert all(value.isfinite().all() for value in load_state(checkpoint).values())
    assert not (run_dir / "packed").exists()
    assert not (run_dir / "report.json").exists()


def test_a_weights_file_that_is_restored_lets_the_run_start(weights: Path) -> None:
    assert train(weights.parents[1] / "run", f"model.weights={weights}", "dry_run=true") == DONE
