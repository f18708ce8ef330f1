"""A program that trains the same run by one process and by several which share tokens out; run by test_context.py.

`context_program.py FOLDER` writes FOLDER/CASE/metrics.csv, checkpoints and validation videos for each case, and in
FOLDER/imageRANK.json how far predictions and gradients of an image-to-video model are from those of one process. Processes
are forked, so that all that they need is imported once.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed, nn

from qvgen.config.schema.train import TrainConfig
from qvgen.models.base import example_condition
from qvgen.models.context_parallel import SharedSequence
from qvgen.training.design.training_run import TrainingRun
from qvgen.training.distributed.child_command import free_port
from qvgen.training.session import train_share
from qvgen.training.shared_error import SharedError
from qvgen.training.start.file import LAYERS_FILE, save_start
from qvgen.training.start.student import Measured
from qvgen.training.trainer import Processes
from qvgen.verbs._inputs import open_held_out
from qvgen.verbs._parts import training_output, training_run
from tests.models.image_folders import make_wan_image_folder
from tests.parts import prepared
from tests.runs import shallow, train_config
from tests.verbs.test_hub_models import tiny_keys

HALF = "trainer.precision=bf16-mixed"
UNMEASURED = ("evaluation.every_steps=null", "evaluation.video_every_steps=null")
CASES = {
    "one": (),
    "fsdp": (
        "devices=4", "strategy=fsdp", "strategy.context_parallel=2", "strategy.gather=codes",
        "strategy.gradient_checkpointing=true",
    ),
    "one-half": (HALF, *UNMEASURED),
    "ddp-half": ("devices=2", "strategy=ddp", "strategy.context_parallel=2", HALF, *UNMEASURED),
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
    output = training_output(config, run_dir=config.run_dir, validate=measurement(config, run, teacher))
    train_share(run, output, student=student, teacher=teacher, processes=processes)


def measurement(
    config: TrainConfig, run: TrainingRun, teacher: nn.Module | None
) -> Callable[[nn.Module], float] | None:
    """What measures the student; where models are shared out the teacher's shares give the reference."""
    if config.evaluation.every_steps is None:
        return None
    inputs = open_held_out(config)
    if run.is_sharded:
        return SharedError(inputs, reference=None, together=True, context=run.strategy.context_parallel)
    return Measured(inputs=inputs, reference=list(inputs.predictions(teacher))).error


def look_at_images(folder: Path, *, rank: int, port: int) -> None:
    """Be one of two processes that share an image-to-video model's tokens out: how far it is from one process."""
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    family = train_config(*tiny_keys("wan-i2v-14b", folder / "image"), f"data.path={folder}").model
    model, draws = family.load_teacher(dtype=torch.float32).requires_grad_(True), torch.Generator().manual_seed(0)
    condition = example_condition(family, count=1, make=lambda *shape: torch.randn(*shape, generator=draws))
    given = torch.randn(1, *family.sample_shape, generator=draws), torch.tensor([500.0]), condition
    found = []
    sequence = SharedSequence([model], processes=2, device=torch.device("cpu"))
    for is_shared in (False, True):
        model.zero_grad()
        if is_shared:
            sequence.apply_()
        predicted = family.predict(model, *given)
        predicted.square().mean().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        if is_shared:
            sequence.remove_()
            distributed.all_reduce(gradients)
        found.append((predicted.detach(), gradients))
    far = [float((shared - alone).norm() / alone.norm()) for alone, shared in zip(*found, strict=True)]
    (folder / f"image{rank}.json").write_text(json.dumps(far))
    distributed.destroy_process_group()


def words(folder: Path, case: str) -> list[str]:
    """Overrides of a case; all have the small model of Wan's class, two samples a step, a rank that falls before step 1."""
    keys = ["steps=2", "batch_size=2", "bits=4", "phi.ranks=[2]", "checkpoint.every_steps=1", "checkpoint.keep=9"]
    measured = [
        "evaluation.every_steps=2",
        "evaluation.samples=3",
        "evaluation.videos=1",
        "evaluation.video_every_steps=2",
    ]
    sampled = ["model.num_inference_steps=2", f"run_dir={folder / case}"]
    return [*keys, *measured, *sampled, *shallow(1), *CASES[case]]


def forked(count: int, work: Callable[..., None], *given: object) -> None:
    """Do some work in processes of their own, which get their rank and a port."""
    port, children = free_port(), []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            work(*given, rank=rank, port=port)
            os._exit(0)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    if any(codes):
        raise SystemExit(f"{given}: a process failed")


def main() -> None:
    folder = Path(sys.argv[1])
    make_wan_image_folder(folder / "image")
    forked(2, look_at_images, folder)
    for case in CASES:
        (folder / case).mkdir()
        count = train_config(*words(folder, case)).devices  # read once: the processes find it
        if case != "one":
            shutil.copy(folder / "one" / LAYERS_FILE, folder / case)
        forked(count, train, folder, case)


if __name__ == "__main__":
    main()
