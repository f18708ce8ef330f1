"""What a new Python process imports and computes: which libraries, when, and on how many threads.

Imports take most of such a process's time, so one process has them for all tests, and what is tried with them is forked:

    import qvgen       what `import qvgen` alone brings, and what diffusers knows then
    the command line   forked: dry runs, which say in the end which modules they have imported
    the other verbs    forked: a run and a sampling, which say on how many threads each operator was called first
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qvgen.cpu_threads import VECTOR_FUNCTIONS
from tests.runs import shallow

TRAINING = {"lightning", "pytorch_lightning", "wandb", "torchmetrics", "matplotlib", "sklearn", "pandas", "datasets"}
"""What trains, measures and reads tables."""

PARTS = {
    "diffusers.pipelines.pipeline_utils", "diffusers.pipelines.wan.pipeline_wan",
    "diffusers.models.autoencoders.autoencoder_kl_wan", "transformers.models.umt5.modeling_umt5",
    "transformers.models.t5.modeling_t5", "transformers.models.bert.modeling_bert",
}  # fmt: skip
"""Parts of a model that a plan does not load: pipelines, autoencoders, text encoders."""

PROGRAM = """
import json, os, sys, warnings
from contextlib import nullcontext

def say(**facts):
    print("said: " + json.dumps(facts), flush=True)

def fork(commands, watch):
    if os.fork() == 0:
        with watch:
            codes = [main(words) for words in commands]
        say(codes=codes, first=getattr(watch, "first", None), modules=sorted(sys.modules))
        os._exit(0)
    os.wait()

dry_runs, run, sampling = json.loads(sys.argv[1])
with warnings.catch_warnings():
    warnings.simplefilter("error", ImportWarning)
    import qvgen
    early = [name for name in ("torch", "diffusers", "lightning", "wandb", "qvgen.deploy") if name in sys.modules]
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __init__(self, first):
            super().__init__()
            self.first = dict(first)

        def __torch_dispatch__(self, operator, types, arguments=(), named=None):
            self.first.setdefault(operator.overloadpacket._qualified_op_name, torch.get_num_threads())
            return operator(*arguments, **(named or {}))

    with Watch({}) as imported:  # what modules make; torch has no thread yet that a fork would lack
        from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as known
        from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING as quantizers
say(
    early=early, knows=known["qvgen"] is qvgen.QvgenConfig and "qvgen" in quantizers,
    deploys="qvgen.deploy.quantizer" in sys.modules,
    waits=any(type(finder).__module__ == "qvgen.after_import" for finder in sys.meta_path),
)
with imported:
    from qvgen.cli import main
    import qvgen.verbs.ptq
assert len(os.listdir("/proc/self/task")) == 1
fork(dry_runs, nullcontext())
with imported:
    import qvgen.verbs.generate
assert len(os.listdir("/proc/self/task")) == 1
fork([run], Watch(imported.first))
fork([sampling], Watch(imported.first))
"""

LIGHT = """
import json, sys
from qvgen.cli import main
for words, code in json.loads(sys.argv[1]):
    assert main(words) == code, words
print("said:", json.dumps({"modules": sorted(sys.modules)}))
"""


def said(program: str, given: Any, *, folder: Path) -> list[dict[str, Any]]:
    """What a new process says, whose environment gives two threads."""
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(given)],
        env={**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"},  # numpy's threads begin at its import
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line.partition(": ")[2]) for line in done.stdout.splitlines() if line.startswith("said: ")]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What is said of `import qvgen`, of three dry runs, of a run and of a sampling."""
    folder = tmp_path_factory.mktemp("new")
    (folder / "clips").mkdir()
    (folder / "clips" / "metadata.csv").write_text("file_name,text\na.mp4,a red boat\n", encoding="utf-8")
    (folder / "clips" / "a.mp4").touch()
    plan = ["dry_run=true", f"run_dir={folder / 'none'}"]
    dry_runs = [
        ["precompute", "model=cogvideox", "data.path=clips", "dry_run=true"],
        ["train", "model=tiny", "bits=4", "device_memory_gib=80", *plan],
        ["ptq", "model=wan", "init=rtn", "bits=4", "evaluation.samples=0", *plan],
    ]
    run = [
        "ptq", "model=tiny", "init=rtn", "bits=4", "logger=csv", f"run_dir={folder / 'run'}", "strategy.threads=1",
        *shallow(1), "evaluation.samples=1", "evaluation.quality_videos=1", "evaluation.videos=0",
    ]  # fmt: skip
    sampling = [
        "generate",
        "model=tiny",
        "prompt=a red three standing still",
        f"out={folder / 'videos'}",
        "num_steps=1",
        *shallow(1),
    ]
    found = said(PROGRAM, [dry_runs, run, sampling], folder=folder)
    assert [stage.get("codes") for stage in found] == [None, [0, 0, 0], [0], [0]]
    return found


def test_import_qvgen_tells_diffusers_and_costs_nothing(stages: list[dict[str, Any]]) -> None:
    assert stages[0] == {"early": [], "knows": True, "deploys": False, "waits": False}


def test_a_dry_run_imports_nothing_that_trains_or_samples_and_no_part_of_a_model(stages: list[dict[str, Any]]) -> None:
    found = set(stages[1]["modules"])
    assert {"qvgen.training.start.student_check", "qvgen.data.clip_source"} <= found
    assert not found & (TRAINING | PARTS)


def test_answers_and_refusals_import_no_torch(tmp_path: Path) -> None:
    commands = [
        (["--help"], 0),
        (["train", "--cfg", "job"], 0),
        (["train", "--help"], 0),
        (["train", "bitz=4"], 2),
        (["train", "model=wam"], 2),
    ]
    (answer,) = said(LIGHT, commands, folder=tmp_path)
    assert "qvgen.cli" in answer["modules"]
    assert not set(answer["modules"]) & (TRAINING | {"torch", "diffusers", "transformers", "peft"})


def test_a_run_computes_on_its_own_number_of_threads_from_the_first_operation_on(stages: list[dict[str, Any]]) -> None:
    first = stages[2]["first"]
    assert {"aten::sin", "aten::cos", "aten::bmm", "aten::addmm"} <= first.keys()
    constants = {"aten::lift_fresh"}  # what modules make while they are imported
    assert {operator for operator, number in first.items() if number > 1} <= constants


def test_sampling_calls_each_vector_function_first_on_one_thread(stages: list[dict[str, Any]]) -> None:
    first = stages[3]["first"]
    assert max(first.values()) == 2
    assert {name: first.get(f"aten::{name}") for name in VECTOR_FUNCTIONS} == dict.fromkeys(VECTOR_FUNCTIONS, 1)
