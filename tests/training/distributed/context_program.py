"""A program that trains the same run by one process and by several which share tokens out; run by test_context.py.

`context_program.py FOLDER` writes FOLDER/CASE/metrics.csv and checkpoints for each case. Processes are forked, so that all
that they need is imported once.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from qvgen.training.distributed.launcher import free_port
from qvgen.training.session import train_share
from qvgen.training.start_file import LAYERS_FILE, save_start
from qvgen.training.trainer import Processes
from qvgen.verbs._parts import training_output, training_run
from tests.parts import prepared
from tests.runs import shallow, train_config

HALF = "trainer.precision=bf16-mixed"
CASES = {
    "one": (),
    "fsdp": (
        "devices=4", "strategy=fsdp", "strategy.context_parallel=2", "strategy.gather=codes",
        "strategy.gradient_checkpointing=true",
    ),
    "one-half": (HALF,),
    "ddp-half": ("devices=2", "strategy=ddp", "strategy.context_parallel=2", HALF),
}  # fmt: skip


def train(folder: Path, case: str, *, rank: int, port: int) -> None:
    """Be one process of a case."""
    config = train_config(*words(folder, case))
    run = training_run(config)
    holds_models = rank == 0 or not run.is_sharded
    student = prepared(config)[0] if holds_models else None
    teacher = config.model.load_teacher() if holds_models else None
    if (
        HALF in CASES[case] and student is not None
    ):  # as CUDA's autocast has it: queries and keys in float32, values in half
        for name, module in student.named_modules():
            if name.endswith(("norm_q", "norm_k")):
                module.register_forward_hook(lambda module, inputs, output: output.float())
    if case == "one":
        save_start(student, config.run_dir)
    processes = Processes(rank=rank, world_size=run.devices, port=port, shards=run.shards)
    train_share(
        run, training_output(config, run_dir=config.run_dir), student=student, teacher=teacher, processes=processes
    )


def words(folder: Path, case: str) -> list[str]:
    """Overrides of a case; all have the small model of Wan's class, two samples a step, a rank that falls before step 1."""
    keys = ["steps=2", "batch_size=2", "bits=4", "phi.ranks=[2]", "checkpoint.every_steps=1", "checkpoint.keep=9"]
    return [*keys, "evaluation.videos=0", *shallow(1), *CASES[case], f"run_dir={folder / case}"]


def main() -> None:
    folder = Path(sys.argv[1])
    for case in CASES:
        (folder / case).mkdir()
        count = train_config(*words(folder, case)).devices  # read once: the processes find it
        if case != "one":
            shutil.copy(folder / "one" / LAYERS_FILE, folder / case)
        port, children = free_port(), []
        for rank in range(count):
            child = os.fork()
            if child == 0:
                train(folder, case, rank=rank, port=port)
                os._exit(0)
            children.append(child)
        if any(os.waitpid(child, 0)[1] for child in children):
            raise SystemExit(f"{case}: a process failed")


if __name__ == "__main__":
    main()
