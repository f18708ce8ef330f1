"""Other launchers: environments as SLURM, Open MPI, PMI, LSF and Kubeflow document them, one task and several."""

from __future__ import annotations

import pytest
from lightning.fabric.plugins.environments import LSFEnvironment, SLURMEnvironment

from qvgen.cli import BAD_INPUT, main
from qvgen.training.distributed.cluster import OneMachine
from qvgen.training.distributed.foreign_launcher import forget_ranks, refuse_foreign_launcher
from qvgen.training.trainer import Processes, build_trainer

ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "qvgen", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
BATCH_SCRIPT = ALLOCATION | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = BATCH_SCRIPT | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
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
    "leftovers": LEFTOVER,
    "a pod with leftovers of ranks alone": {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "RANK": "1", "WORLD_SIZE": "7"},
}
SEVERAL_TASKS = {
    "first of two": (STEP, "SLURM started .SLURM_PROCID=0, SLURM_STEP_NUM_TASKS=2.*srun --ntasks=1"),
    "second of two": (STEP | {"SLURM_PROCID": "1"}, "SLURM_PROCID=1, SLURM_STEP_NUM_TASKS=2"),
    "second, few variables": ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "SLURM_PROCID=1"),
    "first, old variables": (BATCH_SCRIPT | {"SLURM_STEPID": "0"}, "SLURM_NTASKS=2"),
    "mpirun": ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI started .OMPI_COMM_WORLD_RANK=0"),
    "mpiexec": ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "PMI_RANK=1, PMI_SIZE=2"),
    "pmix": ({"PMIX_RANK": "3"}, "PMIX_RANK=3"),
    "mvapich": ({"MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_SIZE": "4"}, "MVAPICH"),
    "jsrun": (LSF | {"JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_SIZE": "2"}, "jsrun started .JSM_NAMESPACE_RANK=1"),
    "pods": (POD | {"RANK": "1", "WORLD_SIZE": "2"}, "Kubeflow started .RANK=1, WORLD_SIZE=2"),
    "torchrun": ({"TORCHELASTIC_RUN_ID": "7"}, "torchrun.*devices=N strategy=ddp"),
}


@pytest.mark.parametrize("environment", ONE_TASK.values(), ids=ONE_TASK)
def test_one_task_is_no_harm(environment: dict[str, str]) -> None:
    refuse_foreign_launcher(environment)


@pytest.mark.parametrize(("environment", "message"), SEVERAL_TASKS.values(), ids=SEVERAL_TASKS)
def test_several_tasks_are_refused_by_name(environment: dict[str, str], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        refuse_foreign_launcher(environment)


def test_leftovers_are_forgotten() -> None:
    environment = LEFTOVER | {"HOME": "/home/me"}
    forget_ranks(environment)
    assert environment == {"HOME": "/home/me"}


@pytest.mark.parametrize("strategy", [["devices=2", "strategy=ddp"], []])
def test_a_second_task_ends_before_anything_begins(
    strategy: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: object
) -> None:
    for name, value in (STEP | {"SLURM_PROCID": "1"}).items():
        monkeypatch.setenv(name, value)
    assert main(["train", f"run_dir={tmp_path}/run", *strategy]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("qvgen train: this is one of several tasks that SLURM started (SLURM_PROCID=1")
    assert main(["precompute"]) == BAD_INPUT  # its tasks may share out the clips: it goes on to what is missing
    assert "SLURM" not in capsys.readouterr().err


@pytest.mark.parametrize("environment", ["sbatch", "jsrun -n 1", "srun --ntasks=1"])
def test_the_trainer_of_one_process_guesses_nothing(environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ONE_TASK[environment].items():
        monkeypatch.setenv(name, value)
    assert SLURMEnvironment.detect() or LSFEnvironment.detect()
    trainer = build_trainer(steps=1, accumulate=1, processes=Processes(), callbacks=[], loggers=[])
    assert isinstance(trainer._accelerator_connector.cluster_environment, OneMachine)
    assert trainer.world_size == 1
