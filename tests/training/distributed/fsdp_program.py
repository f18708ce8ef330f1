"""A program that shards models over two processes and looks at them; run by test_fsdp.py.

`fsdp_program.py RUN_DIR` is rank 0, `fsdp_program.py RUN_DIR --rank 1 ...` the other. RUN_DIR/cases.json names runs by their
overrides. Each process writes RUN_DIR/rankR.json: named facts, compared with models that were never sharded.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from qvgen.layers.swap import quantized_layers
from qvgen.lowrank.sharded import whole
from qvgen.methods.parameter_group import parameter_groups
from qvgen.training.distributed.child import follow_parent
from qvgen.training.distributed.gathering import Gathering
from qvgen.training.distributed.launcher import WorkerGroup
from qvgen.training.distributed.sharded_models import ShardedModels, WholeModels
from qvgen.training.distributed.sharding import add_gradients_by_block_, blocks_of, share_of
from qvgen.training.module import VideoTraining
from qvgen.training.optim.optimizer import build_optimizer
from qvgen.training.optimizer_module import total_norm
from qvgen.training.planning.memory import share_bytes
from qvgen.training.planning.network import network_parts
from qvgen.verbs._parts import student_design, training_run
from tests.parts import prepared, training_module
from tests.runs import BOUNDARIES, STEPS, method_schedule, train_config


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def one_step(module: VideoTraining, optimizer: torch.optim.Optimizer) -> tuple[Tensor, Tensor]:
    """Loss and gradient norm of the same two samples on every process: the mean of equal gradients is that gradient."""
    video = torch.randn(2, *module.family.sample_shape, generator=torch.Generator().manual_seed(0))
    batch = {"video": video, "caption": list(module.family.prompts[:2]), "sample_id": torch.arange(2)}
    loss = module.loss(module.draw(batch, step=0))
    loss.backward()
    norm = total_norm([p.grad for p in module.student.parameters() if p.grad is not None])
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach(), norm


def same(sharded: nn.Module, plain: nn.Module) -> bool:
    found, wanted = sharded.state_dict(), plain.state_dict()
    return list(found) == list(wanted) and all(torch.equal(whole(found[name]), wanted[name]) for name in wanted)


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes that FSDP2's collectives bring to this process, by kind."""
    found, plain = {"gathered": 0, "reduced": 0}, (distributed.all_gather_single, distributed.reduce_scatter_single)

    def gather(output: Tensor, given: Tensor, **options: Any) -> Any:
        found["gathered"] += output.nbytes - given.nbytes
        return plain[0](output, given, **options)

    def reduce(**options: Any) -> Any:
        found["reduced"] += options["input"].nbytes - options["output"].nbytes
        return plain[1](**options)

    distributed.all_gather_single, distributed.reduce_scatter_single = gather, reduce
    try:
        yield found
    finally:
        distributed.all_gather_single, distributed.reduce_scatter_single = plain


def look(overrides: list[str], *, rank: int) -> dict[str, Any]:
    """Everything that is to be said about two processes with shares of one model."""
    config = train_config("devices=2", "strategy=fsdp", *overrides)
    plain, _ = prepared(config)
    teacher = config.model.load_teacher()
    given, _ = prepared(config) if rank == 0 else (None, None)
    models = ShardedModels(
        config.model,
        student_design(config),
        has_teacher=True,
        whole=WholeModels(student=given, teacher=teacher if rank == 0 else None),
        start=config.run_dir / "start.safetensors",  # which is not there: rank 0 sends what it has
        how=Gathering.of(config.strategy),
    )
    facts: dict[str, Any] = {"meta_before": all(p.is_meta for p in models.student.parameters())}
    if config.strategy.gradient_checkpointing:
        models.student.enable_gradient_checkpointing()
    mesh = init_device_mesh("cpu", (2,))
    models.share_out_(mesh, torch.device("cpu"))
    assert models.teacher is not None
    facts["memory_given_back"] = given is None or all(p.is_meta for p in given.parameters())
    for name, model, reference in (("student", models.student, plain), ("teacher", models.teacher, teacher)):
        parameters = list(model.parameters())
        facts[f"{name}_numel"] = sum(local(p).numel() for p in parameters)
        facts[f"{name}_bytes"] = sum(local(p).untyped_storage().nbytes() for p in parameters)
        facts[f"{name}_whole_bytes"] = sum(p.nbytes for p in reference.parameters())
        facts[f"{name}_all"] = sum(p.numel() for p in reference.parameters())
        facts[f"{name}_sharded"] = all(isinstance(p, DTensor) for p in parameters)
        facts[f"{name}_units"] = sum(isinstance(m, FSDPModule) for m in model.modules())
        facts[f"{name}_blocks"] = len(blocks_of(model))
        facts[f"{name}_same"] = same(model, reference)
        buffers = dict(model.named_buffers())
        facts[f"{name}_buffers_same"] = all(torch.equal(buffers[key], b) for key, b in reference.named_buffers())
    facts["student_share_bytes"] = share_bytes(plain.parameters(), shards=2)
    facts["shares_of_files"] = all(
        torch.equal(share_of(whole(p), like=p).to_local(), p.to_local()) for p in models.student.parameters()
    )
    run = training_run(config)
    times = run.steps.batch.num_micro_batches
    parts = {part.name: part.nbytes // times for part in network_parts(run, plain, teacher=teacher)}
    facts["planned"] = {"reduced": parts.pop("gradients, shared out"), "gathered": sum(parts.values())}
    facts["gathered_again"] = "student's weights, backward" in parts
    pairs = []
    add_gradients_by_block_(plain)
    for student, frozen in ((models.student, models.teacher), (plain, teacher)):
        module = training_module(config, student=student.train(), teacher=frozen, encode=config.model.encode)
        facts["teacher_in_state"] = any("teacher" in name for name in module.state_dict())
        facts["teacher_is_submodule"] = frozen in list(module.modules())
        optimizer, _ = build_optimizer(parameter_groups(student, config.optim), config.optim, num_steps=STEPS)
        with counted() as received:
            found = [one_step(module, optimizer) for _ in range(2)]
        facts.setdefault("received", received)
        pairs.append((student, optimizer, found))
    (sharded, mine, found), (_, other, wanted) = pairs
    facts["losses_same"] = [float(a[0]) for a in found] == [float(a[0]) for a in wanted]
    facts["norms_same"] = [float(a[1]) for a in found] == [float(a[1]) for a in wanted]
    facts["trained_same"] = same(sharded, plain)
    facts["shares_outside"] = all(isinstance(p, DTensor) for p in sharded.parameters())
    sampling = {"num_steps": 1, "guidance_scale": 3.0}
    with torch.no_grad():  # leaves nothing behind that the next call would take for what is written now
        config.model.generate(sharded.eval(), config.model.prompts[:1], [3], **sampling)
    facts["shares_after_sampling"] = all(isinstance(p, DTensor) for p in sharded.parameters())
    schedule = method_schedule(config)
    assert schedule is not None
    kept = {name: (id(p), local(p).data_ptr()) for name, p in sharded.named_parameters()}
    for model, optimizer in ((sharded, mine), (plain, other)):
        for step in range(BOUNDARIES[1] + 1):
            schedule.apply_(model, optimizer, step=step)
    facts["ranks"] = sorted({layer.phi.rank for layer in quantized_layers(sharded).values() if layer.phi})
    facts["halved_same"] = same(sharded, plain)
    facts["parameters_kept"] = kept == {name: (id(p), local(p).data_ptr()) for name, p in sharded.named_parameters()}
    moments = {name: mine.state[p] for name, p in sharded.named_parameters()}
    facts["phi_moments"] = sum(
        float(local(v).abs().sum()) for n, s in moments.items() if ".phi." in n for v in s.values()
    )
    facts["weight_moments"] = all(whole(s["exp_avg"]).any() for n, s in moments.items() if n.endswith("to_q.weight"))
    videos = [config.model.generate(m.eval(), config.model.prompts[:1], [3], **sampling) for m in (sharded, plain)]
    facts["videos_same"] = torch.equal(*videos)
    models.gather_()
    facts["gathered_same"] = given is None or same(given, plain)
    facts["gathered_rank"] = 1 if given is None else next(iter(quantized_layers(given).values())).phi.rank
    return facts


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    for name in ("rank", "world-size", "port", "parent", "beats"):
        parser.add_argument(f"--{name}", type=int)
    given = parser.parse_args()

    def work(*, rank: int, port: int) -> None:
        distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        cases = json.loads((given.run_dir / "cases.json").read_text())
        facts = {name: look(overrides, rank=rank) for name, overrides in cases.items()}
        (given.run_dir / f"rank{rank}.json").write_text(json.dumps(facts))

    if given.rank is not None:
        follow_parent(given.parent, beats=given.beats)
        work(rank=given.rank, port=given.port)
        return
    command = [sys.executable, __file__, str(given.run_dir)]
    with WorkerGroup(command, world_size=2, log_directory=given.run_dir / "logs") as group:
        work(rank=0, port=group.port)


if __name__ == "__main__":
    main()
