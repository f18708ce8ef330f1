"""Other launchers: environments as torchrun, SLURM, Open MPI, PMI, LSF and Kubeflow make them, one task and several."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments import LSFEnvironment, SLURMEnvironment
from torch.distributed.run import get_args_parser

from qvgen.cli import BAD_INPUT, TERMINATED, main
from qvgen.config.compose import compose_plain
from qvgen.config.processes.launched_world import LaunchedWorld
from qvgen.training.distributed.child_command import free_port
from qvgen.training.distributed.cluster import GivenRanks
from qvgen.training.distributed.foreign_launcher import find_world, forget_ranks
from qvgen.training.distributed.launched_store import check_shared, wait_for_server
from qvgen.training.distributed.slurm import hosts
from qvgen.training.trainer import Processes, build_trainer

ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "qvgen", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
BATCH_SCRIPT = ALLOCATION | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = BATCH_SCRIPT | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "gpu[08-10,12],login"}
NODES = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_PROCID": "6"} | {
    "SLURM_LOCALID": "2", "SLURM_NODEID": "1"
}  # fmt: skip
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_USE_AGENT_STORE": "True", "RANK": "3",
    "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "n0", "MASTER_PORT": "29500",
}  # fmt: skip
LSF = {"LSB_JOBID": "7", "LSB_DJOB_RANKFILE": "hosts", "JSM_NAMESPACE_LOCAL_RANK": "0"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "MASTER_ADDR": "master", "MASTER_PORT": "23456"}
LEFTOVER = {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "7", "MASTER_PORT": "1", "MASTER_ADDR": "10.255.255.1"}

ONE_TASK = {
    "nothing": {},
    "salloc": ALLOCATION,
    "sbatch": BATCH_SCRIPT,
    "interactive step": BATCH_SCRIPT | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "2"},
    "srun --ntasks=1": STEP | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
    "srun --ntasks=1 in an allocation of two": STEP | {"SLURM_STEP_NUM_TASKS": "1"},
    "mpirun -n 1": {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"},
    "mpiexec -n 1": {"PMI_RANK": "0", "PMI_SIZE": "1"},
    "jsrun -n 1": LSF | {"JSM_NAMESPACE_RANK": "0", "JSM_NAMESPACE_SIZE": "1"},
    "one pod": POD | {"RANK": "0", "WORLD_SIZE": "1"},
    "torchrun --nproc-per-node 1": TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
    "leftovers": LEFTOVER,
    "a pod with leftovers of ranks alone": {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "RANK": "1", "WORLD_SIZE": "7"},
}
SEVERAL_TASKS = {
    "few variables": ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "SLURM_PROCID=1., but SLURM_LOCALID, .* is not in"),
    "uneven nodes": (STEP | NODES | {"SLURM_STEP_TASKS_PER_NODE": "4,3(x1),1"}, "8 tasks on 1 nodes .*='4,3.x1.,1'"),
    "a list": (STEP | {"SLURM_STEP_NODELIST": "n[1-"}, r"nodes 'n\[1-' can't be read; set MASTER_ADDR"),
    "torchrun, few variables": (
        {"TORCHELASTIC_RUN_ID": "7"},
        "torchrun .*but RANK, WORLD_SIZE, .*MASTER_ADDR is not in",
    ),
    "torchrun, uneven nodes": (TORCHRUN | {"WORLD_SIZE": "5"}, "5 processes on 2 nodes, 2 of them here"),
    "mpirun": ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI started .OMPI_COMM_WORLD_RANK=0"),
    "mpiexec": ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "PMI_RANK=1, PMI_SIZE=2"),
    "pmix": ({"PMIX_RANK": "3"}, "PMIX_RANK=3"),
    "mvapich": ({"MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_SIZE": "4"}, "MVAPICH"),
    "jsrun": (LSF | {"JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_SIZE": "2"}, "jsrun started .JSM_NAMESPACE_RANK=1"),
    "pods": (POD | {"RANK": "1", "WORLD_SIZE": "2"}, "Kubeflow started .RANK=1, WORLD_SIZE=2"),
}


@pytest.mark.parametrize("environment", ONE_TASK.values(), ids=ONE_TASK)
def test_one_task_is_no_harm(environment: dict[str, str]) -> None:
    assert find_world(environment) is None


@pytest.mark.parametrize(("environment", "message"), SEVERAL_TASKS.values(), ids=SEVERAL_TASKS)
def test_several_tasks_are_refused_by_name(environment: dict[str, str], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        find_world(environment)


WORLDS = {
    "first of two": (STEP, (0, 2, 0, 2, 0, 1), "gpu08", 12_707),
    "old variables": (BATCH_SCRIPT | {"SLURM_STEPID": "1", "SLURM_NODELIST": "n7"}, (0, 2, 0, 2, 0, 1), "n7", 12_708),
    "second node": (STEP | NODES, (6, 8, 2, 4, 1, 2), "gpu08", 12_707),
    "given address": (STEP | {"MASTER_ADDR": "ib-gpu08", "MASTER_PORT": "4711"}, (0, 2, 0, 2, 0, 1), "ib-gpu08", 4711),
    "a task of srun's with MPI": (STEP | {"PMIX_RANK": "0", "PMI_SIZE": "2"}, (0, 2, 0, 2, 0, 1), "gpu08", 12_707),
    "torchrun": (TORCHRUN, (3, 4, 1, 2, 1, 2), "n0", 29_500),
    "torchrun in a step": (STEP | TORCHRUN, (3, 4, 1, 2, 1, 2), "n0", 29_500),
}
"""Environment -> rank, size, local rank, local size, node, nodes; address and port of rank 0."""


@pytest.mark.parametrize(("environment", "ranks", "address", "port"), WORLDS.values(), ids=WORLDS)
def test_a_task_knows_its_world(environment: dict[str, str], ranks: tuple[int, ...], address: str, port: int) -> None:
    world = find_world(environment)
    assert world is not None
    found = (world.rank, world.size, world.local_rank, world.local_size, world.node_rank, world.nodes)
    assert (found, world.address, world.port) == (ranks, address, port)
    assert world.has_store is ("TORCHELASTIC_RUN_ID" in environment)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n1", ["n1"]),
        ("n1,m2", ["n1", "m2"]),
        ("n[009-011]", ["n009", "n010", "n011"]),
        ("a[1,3-4]b,c", ["a1b", "a3b", "a4b", "c"]),
        ("r[1-2]n[3,5]", ["r1n3", "r1n5", "r2n3", "r2n5"]),
    ],
)
def test_slurms_lists_of_nodes(text: str, expected: list[str]) -> None:
    assert list(hosts(text)) == expected


@pytest.mark.parametrize("text", ["n[1", "n]1", "n[[1]]", "n[a-b]", "n[]"])
def test_what_is_no_list_of_nodes(text: str) -> None:
    with pytest.raises(RuntimeError, match="set MASTER_ADDR"):
        list(hosts(text))


def test_a_folder_that_another_node_does_not_see_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run" / "logs" / "launch.txt"
    told = {"mark": "new", "me": "rank 5 on b", "host": "a", "patience_s": 0.0}
    with pytest.raises(
        RuntimeError, match=f"rank 5 on b does not see .* rank 0 on a .*run_dir={tmp_path}/run: launch.txt"
    ):
        check_shared(file, **told)
    file.parent.mkdir(parents=True)
    file.write_text("old", encoding="utf-8")
    with pytest.raises(RuntimeError, match="it holds an earlier start; give a run_dir on a disk that all nodes share"):
        check_shared(file, **told)
    file.write_text("new", encoding="utf-8")
    check_shared(file, **told)


def test_a_rank_0_that_is_not_reached_is_named_with_its_address() -> None:
    ranks = {"rank": 1, "size": 2, "local_rank": 0, "local_size": 1, "node_rank": 1, "nodes": 2}
    world = LaunchedWorld(
        launcher="SLURM", **ranks, address="127.0.0.1", port=free_port(), session="7.0", has_store=False
    )
    with pytest.raises(
        RuntimeError, match=rf"rank 1 on \S+ does not reach rank 0 at 127.0.0.1:{world.port} .*MASTER_ADDR"
    ):
        wait_for_server(world, patience_s=0.0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["num_nodes=4", "devices=8"],
            "num_nodes=4: .*torchrun --nnodes 4 --nproc-per-node 8 .*srun --nodes 4 --ntasks-per",
        ),
        (
            ["devices=3", "num_nodes=2", "batch_size=32", "strategy=ddp", "dry_run=true"],
            "batch_size=32 cannot .*devices=3 x",
        ),
        (
            ["num_nodes=2", "strategy=single", "dry_run=true"],
            "devices=1 x num_nodes=2 needs more than one process; write .*strategy=auto",
        ),
    ],
)
def test_a_plain_start_has_one_node(keys: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *keys]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


def test_leftovers_are_forgotten() -> None:
    environment = LEFTOVER | {"HOME": "/home/me"}
    forget_ranks(environment)
    assert environment == {"HOME": "/home/me"}


@pytest.mark.parametrize("verb", ["ptq", "fold", "generate", "compare"])
def test_tasks_do_not_do_the_work_of_one_process(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, value in (STEP | {"SLURM_PROCID": "1"}).items():
        monkeypatch.setenv(name, value)
    assert main([verb, f"run_dir={tmp_path}/run"]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"qvgen {verb}: SLURM started 2 processes, and qvgen {verb} is the work of one")
    assert ("devices=N" in line) == (verb in ("ptq", "generate"))
    assert main(["precompute"]) == BAD_INPUT  # its tasks may share out the clips: it goes on to what is missing
    assert "SLURM" not in capsys.readouterr().err
    assert main(["evaluate", "packed=a", "context_parallel=2"]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("qvgen evaluate: context_parallel=2: SLURM started 2 processes, each of which samples whole")
    assert "start it once, with plain python and devices=2 context_parallel=2" in line


@pytest.mark.parametrize("environment", ["sbatch", "jsrun -n 1", "srun --ntasks=1"])
def test_the_trainer_of_one_process_guesses_nothing(environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ONE_TASK[environment].items():
        monkeypatch.setenv(name, value)
    assert SLURMEnvironment.detect() or LSFEnvironment.detect()
    trainer = build_trainer(steps=1, accumulate=1, processes=Processes(), callbacks=[], loggers=[])
    assert isinstance(trainer._accelerator_connector.cluster_environment, GivenRanks)
    assert trainer.world_size == 1


def page() -> str:
    return (Path(__file__).parents[3] / "docs" / "distributed.md").read_text(encoding="utf-8")


def test_torchrun_knows_the_options_of_the_docs() -> None:
    lines = re.findall(r"^torchrun .*$", page(), re.MULTILINE)
    found = [get_args_parser().parse_args(shlex.split(line)[1:]) for line in lines]
    assert [(line.nnodes, line.nproc_per_node, line.training_script) for line in found] == [
        ("1:1", "8", "train.py"),
        ("4", "8", "train.py"),
        ("4", "8", "qvgen.cli"),
        ("2", "8", "train.py"),
    ]


def test_the_batch_script_of_the_docs_is_one_and_continues_a_run() -> None:
    (script,) = re.findall(r"```sh\n(.*?)```", page(), re.DOTALL)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    (command,) = re.findall(r"^srun .* python train.py (.*)$", script, re.MULTILINE)
    plain = compose_plain("train", shlex.split(command))
    assert (plain["resume"], plain["run_dir"]) == (True, "runs/wan-14b")
    assert "#SBATCH --signal=USR1@" in script  # without B: it reaches srun's tasks
    assert f"-eq {TERMINATED}" in script
