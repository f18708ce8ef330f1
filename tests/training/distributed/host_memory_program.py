"""Host memory of a start and of a checkpoint, measured in the processes of a run and held against its plan.

    python tests/training/distributed/host_memory_program.py --width 5120 --feed-forward 13824 --blocks 1 --out FOLDER

A folder of Wan's class with random weights in bfloat16 is written, of the given width and so many blocks, unless it is there.
Then each rank is a process, which runs what a run runs there:

    start        rank 0 prepares the student, loads the teacher, shares out the layers, gathers them, saves the start;
                 the others set up their layers
    streamed     the same start with strategy.low_host_memory: no rank has a model
    rows         every rank reads its rows of student and teacher from files, and keeps them on the host (one with GPUs does
                 not); behind `streamed`
    trained      the start of `streamed`, as a checkpoint that the ranks write together; nothing is measured
    fold         rank 0 folds the checkpoint of `trained`, writes the packed model, reads it back and compares codes; planned
                 is one copy of the model in bfloat16; behind `trained`
    checkpoint   shares of the student and of its moments are saved while they stay, by all ranks together

A thread looks at the process's own memory (RssAnon of /proc/self/status: pages of mapped files are the system's to take
back) a few hundred times a second. What a process had before, Python and the libraries, is taken off: no plan counts it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from qvgen.config.bits import Bits
from qvgen.config.defaults import load_section
from qvgen.config.leaves import load_leaf, load_profile
from qvgen.models.named_family import NamedFamily
from qvgen.training.checkpoint.folder import take_snapshot, write_folder
from qvgen.training.checkpoint.folder_reader import CheckpointFolder
from qvgen.training.design.meta_model import build_student
from qvgen.training.design.student import StudentDesign
from qvgen.training.distributed.sharded_models import ShardedModels
from qvgen.training.distributed.sharded_strategy import _shares
from qvgen.training.distributed.sharding import blocks_of, sharded_as
from qvgen.training.distributed.store_exchange import StoreExchange, default_store
from qvgen.training.planning.host_memory import preparation_bytes, setup_bytes
from qvgen.training.start.file import START_FILE, restore_layers_, save_start
from qvgen.training.start.shared import StartHelpers, initialize_together_, set_up_share
from qvgen.training.start.streamed import make_streamed_start
from qvgen.training.start.streamed_fold import StreamedFold
from qvgen.training.start.student import prepare_student, save_folded

HEAD = 128
RANK, SEED = 32, 0
LAST = 24
"""Steps of the training that the checkpoint of `trained` ends: enough for each phase of Phi."""
CHECKPOINT = f"step-{LAST:08}.ckpt"
LOOK_SECONDS = 0.003
WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")


def main() -> None:
    """Measure, as the process that was started or as one of its ranks."""
    parser = argparse.ArgumentParser()
    for name in ("width", "feed-forward", "blocks"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--init", default="mse")
    parser.add_argument("--moments", type=int, default=2)
    parser.add_argument("--parts", nargs="+", default=["start", "checkpoint"], choices=list(PARTS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rank", type=int)
    given = parser.parse_args()
    if given.rank is not None:
        PARTS[given.parts[0]](given)
        return
    given.out.mkdir(parents=True, exist_ok=True)
    written = (given.out / "model" / WEIGHTS).is_file()
    for part, ranks in {"folder": 0 if written else 1, **dict.fromkeys(given.parts, given.processes)}.items():
        processes = [run_rank(part, rank) for rank in range(ranks)]
        if sum(process.wait() != 0 for process in processes):
            sys.exit(1)
    for part in given.parts:
        for rank in range(given.processes):
            sys.stdout.write(f"{result_file(given, part, rank).read_text()}\n")


def run_rank(part: str, rank: int) -> subprocess.Popen[bytes]:
    """A rank's process, with the words of this one."""
    return subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--parts", part, "--rank", str(rank)])


def result_file(given: argparse.Namespace, part: str, rank: int) -> Path:
    """Where a rank writes what it measured."""
    return Path(given.out / f"{part}-{rank}.json")


def write_model(given: argparse.Namespace) -> None:
    """A model's folder: the published configurations at the given size, and random weights."""
    published = load_leaf("model", "wan-14b").published
    sizes = {"num_attention_heads": given.width // HEAD, "ffn_dim": given.feed_forward, "num_layers": given.blocks}
    config = {"_class_name": "WanTransformer3DModel", **published["transformer"], **sizes}
    classes = {
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
    }
    files = {
        "model_index.json": {"_class_name": "WanPipeline", **classes},
        "transformer/config.json": config,
        "vae/config.json": {"_class_name": "AutoencoderKLWan", **published["vae"]},
        "scheduler/scheduler_config.json": published["scheduler"],
    }
    for name, content in files.items():
        (given.out / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (given.out / "model" / name).write_text(json.dumps(content))
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in load_leaf("model", "wan-14b").build(config).state_dict().items()}
    generator = torch.Generator().manual_seed(SEED)
    drawn = {}
    for name, shape in shapes.items():
        drawn[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    save_file(drawn, given.out / "model" / WEIGHTS)


def model_of(given: argparse.Namespace) -> NamedFamily:
    """The model in the folder."""
    return NamedFamily.load("wan-14b", path=str(given.out / "model"))


def design_of() -> StudentDesign:
    """The student of ``bits=w4a4``."""
    profile = load_profile("paper", Bits.parse("w4a4"))
    return StudentDesign(profile=profile, method=load_leaf("method", "qvgen"), phi=load_section("phi", rank=RANK))


class Watch:
    """The largest amount of this process's own memory while a block runs, above what it had before.

    Attributes:
        own: Bytes at the peak, without pages of mapped files.
        all: The same with them (``VmHWM``).
    """

    def __init__(self) -> None:
        self.own = self.all = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Self:
        Path("/proc/self/clear_refs").write_text("5")
        self._before = (status("RssAnon"), status("VmRSS"))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.all = status("VmHWM") - self._before[1]

    def _look(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self.own = max(self.own, status("RssAnon") - self._before[0])


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def run_start(given: argparse.Namespace) -> None:
    """One rank's share of a start."""
    torch.set_num_threads(1)
    model, design, init = model_of(given), design_of(), load_leaf("init", given.init)
    asked = given.out / "asked"
    if given.rank:
        while not asked.exists():
            time.sleep(0.1)
    with Watch() as watch:
        if given.rank:
            share = {"family": model.family, "design": design, "init": init, "seed": SEED}
            set_up_share(given.out, rank=given.rank, **share)
        else:
            student, _ = prepare_student(model.family, design, seed=None)
            teacher = model.family.load_teacher()
            helpers = StartHelpers(
                world_size=given.processes, neighbours=given.processes, run_dir=given.out, ask=asked.touch, check=int
            )
            initialize_together_(
                student, init, family=model.family, seed=SEED, statistics=None, helpers=helpers, done=int
            )
            save_start(student, given.out)
            asked.unlink()
            del teacher
    write_result(given, "start", watch, planned=planned_start(given))


def write_result(given: argparse.Namespace, part: str, watch: Watch, *, planned: int) -> None:
    """Write what a rank measured, beside what its plan says."""
    found = {"part": part, "rank": given.rank, "own": watch.own, "planned": planned, "with_mapped_files": watch.all}
    result_file(given, part, given.rank).write_text(json.dumps(found))


def planned_start(given: argparse.Namespace) -> int:
    """What the plan says of a rank's share of a start."""
    model, design = model_of(given), design_of()
    student, _ = build_student(model.family, design)
    own = setup_bytes(student, rank=given.rank, world_size=given.processes, neighbours=given.processes)
    return own if given.rank else own + preparation_bytes(model, design)


def run_checkpoint(given: argparse.Namespace) -> None:
    """One rank's share of a checkpoint: rows of all weights, and two moments of each, as an optimizer has them."""
    torch.set_num_threads(1)
    ranks = {"rank": given.rank, "world_size": given.processes}
    distributed.init_process_group("gloo", init_method=f"file://{given.out.absolute() / 'meet'}", **ranks)
    student, _ = build_student(model_of(given).family, design_of())
    mesh = init_device_mesh("cpu", (given.processes,))
    for unit in (*blocks_of(student), student):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    student.to_empty(device="cpu")
    state: dict[str, Any] = {"global_step": 1, "state_dict": {}, "moments": {}}
    for name, value in student.state_dict().items():
        rows = value.to_local() if isinstance(value, DTensor) else value
        rows.zero_()
        if isinstance(value, DTensor):
            state["moments"][name] = [sharded_as(rows.clone(), like=value) for _ in range(given.moments)]
        state["state_dict"][name] = value
    exchange = StoreExchange(default_store(), **ranks)
    with Watch() as watch:
        snapshot = take_snapshot(_shares(state), run=None, rank=given.rank).on_host()
        write_folder(given.out / "step-00000001.ckpt", snapshot, **ranks, exchange=exchange)
    shutil.rmtree(given.out / "step-00000001.ckpt", ignore_errors=True)
    planned = sum(value.nbytes for value in student.state_dict().values()) * (1 + given.moments) // given.processes
    write_result(given, "checkpoint", watch, planned=planned)
    distributed.destroy_process_group()


def run_streamed(given: argparse.Namespace) -> None:
    """One rank's share of a start for which no rank has a model."""
    torch.set_num_threads(1)
    model, design, init = model_of(given), design_of(), load_leaf("init", given.init)
    asked, how = given.out / "asked", {"family": model.family, "design": design, "init": init, "seed": SEED}
    while given.rank and not asked.exists():
        time.sleep(0.1)
    with Watch() as watch:
        if given.rank:
            set_up_share(given.out, rank=given.rank, **how, one_by_one=True)
        else:
            size = given.processes
            helpers = StartHelpers(
                world_size=size, neighbours=size, run_dir=given.out, ask=asked.touch, check=lambda: None
            )
            make_streamed_start(given.out, **how, helpers=helpers)
            asked.unlink()
    student, _ = build_student(model.family, design)
    sizes = {"rank": given.rank, "world_size": given.processes, "neighbours": given.processes}
    write_result(given, "streamed", watch, planned=setup_bytes(student, **sizes, one_by_one=True))


def run_rows(given: argparse.Namespace) -> None:
    """One rank's rows of student and teacher, which stay on the host here; planned are these and two copies of a tensor."""
    torch.set_num_threads(1)
    ranks = {"rank": given.rank, "world_size": given.processes}
    distributed.init_process_group("gloo", init_method=f"file://{given.out.absolute() / 'meet'}", **ranks)
    start = given.out / START_FILE
    models = ShardedModels(model_of(given).family, design_of(), has_teacher=True, whole=None, start=start)
    restore_layers_(models.student, given.out)
    mesh = init_device_mesh("cpu", (given.processes,))
    with Watch() as watch:
        models.share_out_(mesh, torch.device("cpu"))
    both = [*models.student.parameters(), *models.teacher.parameters()]
    shares = sum(value.to_local().nbytes for value in both)
    largest = max(4 * value.numel() for value in models.teacher.parameters())
    write_result(given, "rows", watch, planned=shares + 2 * largest)
    distributed.destroy_process_group()


def run_trained(given: argparse.Namespace) -> None:
    """One rank's part of a checkpoint that holds the start."""
    torch.set_num_threads(1)
    ranks = {"rank": given.rank, "world_size": given.processes}
    distributed.init_process_group("gloo", init_method=f"file://{given.out.absolute() / 'meet'}", **ranks)
    models = ShardedModels(
        model_of(given).family, design_of(), has_teacher=False, whole=None, start=given.out / START_FILE
    )
    restore_layers_(models.student, given.out)
    with Watch() as watch:
        models.share_out_(init_device_mesh("cpu", (given.processes,)), torch.device("cpu"))
        state = {"global_step": LAST, "state_dict": models.student.state_dict()}
        snapshot = take_snapshot(_shares(state), run=None, rank=given.rank)  # no step changes it meanwhile
        exchange = StoreExchange(default_store(), **ranks)
        write_folder(given.out / CHECKPOINT, snapshot, **ranks, exchange=exchange)
    write_result(given, "trained", watch, planned=0)
    distributed.destroy_process_group()


def run_fold(given: argparse.Namespace) -> None:
    """What `qvgen fold` does with a checkpoint, as rank 0; the others do nothing."""
    torch.set_num_threads(1)
    model, design = model_of(given), design_of()
    with Watch() as watch:
        if not given.rank:
            checkpoint = CheckpointFolder(given.out / CHECKPOINT)
            checkpoint.check(only=["state_dict"])
            trained = checkpoint.state["state_dict"]
            how = {"trained": trained, "averaged": {}, "schedule": design.schedule(LAST), "step": LAST}
            folding = StreamedFold(model.family, design, given.out, **how)
            folded, fill = folding.declare_(kernel="auto"), partial(folding.write, kernel="auto")
            save_folded(folded, given.out / "packed", model=model, training={}, kept=0, fill=fill)
            equal, count = folding.codes_equal(given.out / "packed")
            assert equal, f"some of {count} codes are others"
    student, _ = build_student(model.family, design)
    write_result(given, "fold", watch, planned=2 * sum(value.numel() for value in student.state_dict().values()))


PARTS = {
    "folder": write_model,
    "start": run_start,
    "streamed": run_streamed,
    "rows": run_rows,
    "trained": run_trained,
    "fold": run_fold,
    "checkpoint": run_checkpoint,
}


if __name__ == "__main__":
    main()
