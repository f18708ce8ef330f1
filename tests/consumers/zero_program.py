"""A program that trains parts of runs with DeepSpeed on two processes of a CPU, and without; run by test_zero_runs.py.

`zero_program.py FOLDER` is rank 0, `zero_program.py FOLDER --rank 1 ...` the other. FOLDER/parts.json is a list: a run's
name, its configuration, and the name of another run from whose checkpoint after step 3 it goes on, or null. Runs of one
process are rank 0's alone.
"""

from __future__ import annotations

import json
import shutil
import sys
from argparse import ArgumentParser
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import distributed

from qvgen import stop_request
from qvgen.config.build import build
from qvgen.data import moving_digits
from qvgen.layers.swap import quantized_layers
from qvgen.training.distributed.child import follow_parent
from qvgen.training.distributed.launcher import WorkerGroup
from qvgen.training.distributed.plain_group import joined_group
from qvgen.training.distributed.zero_keeper import MOMENTS
from qvgen.training.distributed.zero_strategy import ZeroStrategy
from qvgen.training.planning.zero_memory import zero_sizes
from qvgen.training.session import train_share
from qvgen.training.shared_error import SharedError
from qvgen.training.start.file import load_start, save_start
from qvgen.training.whole_run import processes_of
from qvgen.verbs._inputs import open_held_out
from qvgen.verbs._parts import training_output, training_run
from tests.parts import prepared
from tests.training.distributed.world_program import drawn

GONE_ON_FROM = 3


class Spoil(lightning.Callback):
    """Takes back a value of Phi that the schedule has written, as an in-place write is lost: training has to end."""

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, *further: Any) -> None:
        phi = next(layer.phi for layer in quantized_layers(pl_module.student).values() if layer.phi is not None)
        assert isinstance(trainer.strategy, ZeroStrategy)
        keeper = trainer.strategy.keeper
        assert keeper is not None
        if not hasattr(self, "before"):
            self.before = keeper.whole(phi.left).clone()
        elif keeper._written:
            setter = keeper._deepspeed.utils.safe_set_full_fp32_param
            setter(phi.left, self.before)


class Sizes(lightning.Callback):
    """Has the bytes of masters and of moments that a process keeps while it trains."""

    found: tuple[int, int] | None = None

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *further: Any) -> None:
        if isinstance(trainer.strategy, ZeroStrategy):
            inner = trainer.strategy.deepspeed_engine.optimizer.optimizer
            flats = [flat for group in inner.param_groups for flat in group["params"]]
            moments = [inner.state[flat][name] for flat in flats for name in MOMENTS if flat in inner.state]
            self.found = tuple(sum(tensor.nbytes for tensor in tensors) for tensors in (flats, moments))


def work(folder: Path, part: dict[str, Any], *, rank: int, port: int) -> str | None:
    """Train; what went wrong."""
    run_dir = folder / part["name"]
    config = build("train", part["config"])
    run = training_run(config)
    if rank >= run.devices:
        return None
    student, _ = prepared(config)
    load_start(student, run_dir)
    teacher, validate = config.model.load_teacher(), None
    if config.evaluation.every_steps is not None:
        validate = SharedError(open_held_out(config), reference=None, together=run.calls_together)
        validate.take_reference_of(teacher)
    sizes = Sizes()
    output = replace(
        training_output(config, run_dir, validate=validate), callbacks=[Spoil()] if part["spoiled"] else [sizes]
    )
    try:
        train_share(run, output, student=student, teacher=teacher, processes=processes_of(run, rank=rank, port=port))
    except RuntimeError as error:
        if not part["spoiled"]:
            raise
        return str(error)
    trained = {name: value.detach().clone() for name, value in student.state_dict().items()}
    torch.save(trained, run_dir / f"trained-{rank}.pt")
    said = {"planned": zero_sizes(run, student), "found": sizes.found}
    (run_dir / f"sizes-{rank}.json").write_text(json.dumps(said))
    return None


def make_folder(folder: Path, part: dict[str, Any]) -> None:
    """A run's folder with its start, or with another run up to a step."""
    run_dir = folder / part["name"]
    if part["from"] is None:
        run_dir.mkdir()
        save_start(prepared(build("train", part["config"]))[0], run_dir)
        return
    shutil.copytree(folder / part["from"], run_dir)
    for path in (run_dir / "checkpoints").glob("step-*.ckpt"):
        if int(path.stem[-8:]) > GONE_ON_FROM:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def do_all(folder: Path, *, rank: int, port: int) -> None:
    moving_digits._handwriting = drawn  # type: ignore[assignment]
    said = {}
    with joined_group(rank=rank, world_size=2, port=port):
        for part in json.loads((folder / "parts.json").read_text()):
            if rank == 0:
                make_folder(folder, part)
            distributed.barrier()
            said[part["name"]] = work(folder, part, rank=rank, port=port)
            distributed.barrier()
    (folder / f"said-{rank}.json").write_text(json.dumps(said))


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("folder", type=Path)
    for name in ("rank", "world-size", "port", "parent", "beats"):
        parser.add_argument(f"--{name}", type=int)
    given = parser.parse_args()
    if given.rank is not None:
        follow_parent(given.parent, beats=given.beats)
        do_all(given.folder, rank=given.rank, port=given.port)
        return
    command = [sys.executable, __file__, str(given.folder)]
    with ExitStack() as stack:
        stack.enter_context(stop_request.listening())
        group = stack.enter_context(WorkerGroup(command, world_size=2, log_directory=given.folder / "logs"))
        do_all(given.folder, rank=0, port=group.port)


if __name__ == "__main__":
    main()
