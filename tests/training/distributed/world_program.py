"""A program that trains some steps of a run from its newest checkpoint, with any number of processes; run by its test.

`world_program.py RUN_DIR` is rank 0, `world_program.py RUN_DIR --rank 1 ...` another. RUN_DIR/part.json holds the run's
configuration, composed once for all processes, the step it is stopped after, and a name: each process writes its part of the
state that training begins with to RUN_DIR/NAME.loaded-RANK, rank 0 also what no process has a share of.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from argparse import ArgumentParser
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.distributed.tensor import DTensor

from qvgen import stop_request
from qvgen.config import TrainConfig
from qvgen.config.build import build
from qvgen.data import moving_digits
from qvgen.training.callbacks.average import Average
from qvgen.training.checkpoint import folder as checkpoint_folder
from qvgen.training.checkpoint import part as checkpoint_part
from qvgen.training.distributed.child import follow_parent
from qvgen.training.distributed.launcher import WorkerGroup
from qvgen.training.session import train_share
from qvgen.training.start.file import load_start, save_start
from qvgen.training.whole_run import processes_of
from qvgen.verbs._parts import training_output, training_run
from tests.parts import prepared


class Look(lightning.Callback):
    """Writes what training begins with, each process its own rows, and asks to stop in a step."""

    def __init__(self, file: Path, *, stop_in: int) -> None:
        self.file, self.stop_in = file, stop_in
        self.state: dict[str, dict[str, torch.Tensor]] = {"rows": {}, "whole": {}}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        for name, value in pl_module.state_dict().items():
            self._take(f"state_dict/{name}", value, value)
        optimizer: Any = trainer.optimizers[0]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, parameter in enumerate(parameters):
            for name, value in optimizer.state.get(parameter, {}).items():
                self._take(f"moments/{index}/{name}", value, parameter)
        average = next(callback for callback in trainer.callbacks if isinstance(callback, Average))
        for name, parameter in pl_module.student.named_parameters():
            if name in average.tensors:
                self._take(f"average/{name}", average.tensors[name], parameter)
        if not trainer.is_global_zero:
            del self.state["whole"]
        torch.save(self.state, self.file.with_name(f"{self.file.name}-{trainer.global_rank}"))

    def _take(self, name: str, value: torch.Tensor, parameter: Any) -> None:
        kind = "rows" if isinstance(parameter, DTensor) and value.ndim else "whole"
        self.state[kind][name] = (value.to_local() if isinstance(value, DTensor) else value).detach().clone()

    def on_train_batch_start(self, trainer: lightning.Trainer, *further: Any) -> None:
        if trainer.global_step == self.stop_in - 1 and trainer.is_global_zero:
            os.kill(os.getpid(), signal.SIGTERM)
            self.stop_in = 0


def spoil_the_second_save(fault: str) -> None:
    """Have this process killed while it writes its part, or its disk full."""
    write_part, write_rows, calls = checkpoint_folder.write_part, checkpoint_part._write_rows, iter(range(99))

    def killed(file: Any, rows: Any) -> str:
        checksum = write_rows(file, rows)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
        return checksum

    def spoiled(*arguments: Any, **ranks: Any) -> str:
        if (call := next(calls)) == 1 and fault == "killed":
            checkpoint_part._write_rows = killed
        elif call == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        return write_part(*arguments, **ranks)

    checkpoint_folder.write_part = spoiled


def drawn(split: str) -> tuple[torch.Tensor, tuple[int, ...]]:
    """In the place of scikit-learn's handwriting, which takes each process more than a second to import."""
    count = moving_digits.TRAIN_IMAGES
    ink = torch.rand(count, 8, 8, generator=torch.Generator().manual_seed(len(split)))
    return ink, tuple(number % 10 for number in range(count))


def configuration(part: dict[str, Any]) -> TrainConfig:
    config = build("train", part["config"])
    assert isinstance(config, TrainConfig)
    return config


def work(run_dir: Path, part: dict[str, Any], *, rank: int, port: int) -> None:
    moving_digits._handwriting = drawn  # type: ignore[assignment]
    config = configuration(part)
    if rank == 1 and part["fault"] is not None:
        spoil_the_second_save(part["fault"])
    run = training_run(config)
    output = replace(
        training_output(config, run_dir),
        callbacks=[Look(run_dir / f"{part['name']}.loaded", stop_in=part["stop_after"])],
    )
    student = teacher = None
    if rank == 0 or not run.is_sharded:
        student, _ = prepared(config)
        load_start(student, run_dir)
        teacher = config.model.load_teacher()
    with suppress(stop_request.Stopped):
        train_share(run, output, student=student, teacher=teacher, processes=processes_of(run, rank=rank, port=port))


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    for name in ("rank", "world-size", "port", "parent", "beats"):
        parser.add_argument(f"--{name}", type=int)
    given = parser.parse_args()
    part = json.loads((given.run_dir / "part.json").read_text())
    if given.rank is not None:
        follow_parent(given.parent, beats=given.beats)
        work(given.run_dir, part, rank=given.rank, port=given.port)
        return
    command = [sys.executable, __file__, str(given.run_dir)]
    with ExitStack() as stack:
        stack.enter_context(stop_request.listening())
        if not (given.run_dir / "start.safetensors").exists():
            save_start(prepared(configuration(part))[0], given.run_dir)
        port = 0
        if part["world_size"] > 1:
            group = WorkerGroup(command, world_size=part["world_size"], log_directory=given.run_dir / "logs")
            port = stack.enter_context(group).port
        work(given.run_dir, part, rank=0, port=port)


if __name__ == "__main__":
    main()
