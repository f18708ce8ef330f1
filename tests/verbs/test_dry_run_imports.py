"""What a dry run, an answer about the configuration and a refusal do without: whole libraries, whose import takes seconds.

Each command runs in a process of its own and says which modules it had imported when it ended.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TRAINING = {"lightning", "pytorch_lightning", "wandb", "torchmetrics", "matplotlib", "sklearn", "pandas", "datasets"}
"""What trains, measures and reads tables."""

PARTS = {
    "diffusers.pipelines.pipeline_utils", "diffusers.pipelines.wan.pipeline_wan",
    "diffusers.models.autoencoders.autoencoder_kl_wan", "transformers.models.umt5.modeling_umt5",
    "transformers.models.t5.modeling_t5", "transformers.models.bert.modeling_bert",
}  # fmt: skip
"""Parts of a model that a plan does not load: pipelines, autoencoders, text encoders."""

SMALL = ["model.num_layers=1", "batch_size=2", "steps=12", "phi.rank=2"]

PROGRAM = """
import sys
from qvgen.cli import main
code = main(sys.argv[1:])
print("imported:", " ".join(sorted(sys.modules)))
sys.exit(code)
"""


def imported(*arguments: str, code: int, folder: Path) -> set[str]:
    """Modules that a command imports, its exit code asserted."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == code, done.stderr
    return set(done.stdout.rpartition("imported:")[2].split())


@pytest.mark.parametrize(
    "arguments",
    [["train", "model=wan", "bits=4", "device_memory_gib=80"], ["ptq", "init=rtn", "bits=4", "evaluation.samples=0"]],
    ids=["train", "ptq"],
)
def test_a_dry_run_imports_nothing_that_trains_or_samples(arguments: list[str], tmp_path: Path) -> None:
    found = imported(*arguments, "dry_run=true", f"run_dir={tmp_path / 'run'}", code=0, folder=tmp_path)
    assert "qvgen.training.student_check" in found
    assert not found & TRAINING
    assert not found & PARTS


def test_precompute_plans_without_the_parts_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "metadata.csv").write_text("file_name,text\na.mp4,a red boat\n", encoding="utf-8")
    (tmp_path / "clips" / "a.mp4").touch()
    keys = ["model=cogvideox", "data.path=clips", "dry_run=true"]
    found = imported("precompute", *keys, code=0, folder=tmp_path)
    assert "qvgen.data.clip_source" in found
    assert not found & (TRAINING | PARTS)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "--cfg", "job"], 0),
        (["train", "--help"], 0),
        (["train", "bitz=4"], 2),
        (["train", "model=wam"], 2),
    ],
)
def test_answers_and_refusals_import_no_torch(arguments: list[str], code: int, tmp_path: Path) -> None:
    found = imported(*arguments, code=code, folder=tmp_path)
    assert "qvgen.cli" in found
    assert not found & (TRAINING | {"torch", "diffusers", "transformers", "peft"})
