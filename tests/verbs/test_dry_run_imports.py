"""What a dry run, an answer about the configuration and a refusal do without: whole libraries, whose import takes seconds.

The commands of a test run one after the other in a process that says which modules it has imported in the end.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TRAINING = {"lightning", "pytorch_lightning", "wandb", "torchmetrics", "matplotlib", "sklearn", "pandas", "datasets"}
"""What trains, measures and reads tables."""

PARTS = {
    "diffusers.pipelines.pipeline_utils", "diffusers.pipelines.wan.pipeline_wan",
    "diffusers.models.autoencoders.autoencoder_kl_wan", "transformers.models.umt5.modeling_umt5",
    "transformers.models.t5.modeling_t5", "transformers.models.bert.modeling_bert",
}  # fmt: skip
"""Parts of a model that a plan does not load: pipelines, autoencoders, text encoders."""

PROGRAM = """
import json, sys
from qvgen.cli import main
for words, code in json.loads(sys.argv[1]):
    assert main(words) == code, words
print("imported:", " ".join(sorted(sys.modules)))
"""


def imported(*commands: tuple[list[str], int], folder: Path) -> set[str]:
    """Modules that have been imported once a process has run commands, each of which ends with its exit code."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)], capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("imported:")[2].split())


def test_a_dry_run_imports_nothing_that_trains_or_samples_and_no_part_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "metadata.csv").write_text("file_name,text\na.mp4,a red boat\n", encoding="utf-8")
    (tmp_path / "clips" / "a.mp4").touch()
    plan = ["dry_run=true", f"run_dir={tmp_path / 'run'}"]
    found = imported(
        (["precompute", "model=cogvideox", "data.path=clips", "dry_run=true"], 0),
        (["train", "model=wan", "bits=4", "device_memory_gib=80", *plan], 0),
        (["ptq", "init=rtn", "bits=4", "evaluation.samples=0", *plan], 0),
        folder=tmp_path,
    )
    assert {"qvgen.training.student_check", "qvgen.data.clip_source"} <= found
    assert not found & (TRAINING | PARTS)


def test_answers_and_refusals_import_no_torch(tmp_path: Path) -> None:
    found = imported(
        (["--help"], 0),
        (["train", "--cfg", "job"], 0),
        (["train", "--help"], 0),
        (["train", "bitz=4"], 2),
        (["train", "model=wam"], 2),
        folder=tmp_path,
    )
    assert "qvgen.cli" in found
    assert not found & (TRAINING | {"torch", "diffusers", "transformers", "peft"})
