"""Builds the Lightning trainer of one process and runs it. What is trained comes from outside."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from qvgen.config.processes.launched_world import LaunchedWorld
from qvgen.config.schema.trainer import TrainerConfig
from qvgen.errors import UserError, one_line
from qvgen.training.checkpoint_writer import AtomicCheckpointIO
from qvgen.training.distributed.child_command import guard_world_size
from qvgen.training.distributed.cluster import GivenRanks, group_backend
from qvgen.training.distributed.plain_group import COLLECTIVE_TIMEOUT
from qvgen.training.distributed.sharded_strategy import ShardedStrategy
from qvgen.training.distributed.zero_strategy import ZeroStrategy
from qvgen.training.strategies import DataParallel, OneDevice
from qvgen.training.tracking.guarded_logger import guard_

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: This process.
        world_size: All processes; more than one trains by DDP, or FSDP2.
        port: Where they find each other.
        shards: Over how many of them parameters, gradients and moments are shared out (FSDP2): groups of so many hold a
            whole each; 1: each process holds all.
        shares_on_host: Whether shares lie in the host's memory, so that processes of GPUs talk about tensors there, too.
        launched: Where they stand, if another launcher started them; None: all on this machine, started by us.
        zero: Whether DeepSpeed shares out masters, gradients and moments.
    """

    rank: int = 0
    world_size: int = 1
    port: int = 0
    shards: int = 1
    shares_on_host: bool = False
    launched: LaunchedWorld | None = None
    zero: bool = False

    @property
    def sharded(self) -> bool:
        """Whether no process holds a whole model."""
        return self.shards > 1

    @property
    def num_nodes(self) -> int:
        """Machines."""
        return 1 if self.launched is None else self.launched.nodes


def build_trainer(
    *,
    steps: int,
    accumulate: int,
    processes: Processes,
    callbacks: list[lightning.Callback],
    loggers: list[Logger],
    options: Mapping[str, Any] | None = None,
    measured: bool = False,
) -> lightning.Trainer:
    """Trainer of one process: float32 on the CPU, bfloat16 autocast over float32 masters on a GPU.

    Args:
        steps: Optimizer steps.
        accumulate: Micro-batches per optimizer step.
        processes: This one and the others.
        callbacks: See :mod:`qvgen.training.callbacks.steps`.
        loggers: See :func:`qvgen.training.tracking.wandb_run.training_log`; rank 0 only.
        options: Further arguments of Lightning's Trainer, see :func:`trainer_arguments`; an accelerator and a strategy for
            another kind of device stand here, too.
        measured: The module is measured between its steps (``validation_step``).
    """
    on_gpu = torch.cuda.is_available()
    with quiet_lightning():
        placed = {"accelerator": "gpu" if on_gpu else "cpu", "precision": "bf16-mixed" if on_gpu else "32-true"}
        if processes.zero:
            del placed["precision"]  # the strategy's own
        given = placed | {"strategy": _strategy(processes, on_gpu=on_gpu), "log_every_n_steps": 1} | dict(options or {})
        # A single process has a place for it too: Lightning would look for SLURM, LSF and MPI in the environment.
        alone = [GivenRanks(rank=0, world_size=1, port=0)] if processes.world_size == 1 else []
        trainer = lightning.Trainer(
            devices=processes.world_size // processes.num_nodes,
            num_nodes=processes.num_nodes,
            plugins=[AtomicCheckpointIO(mapped=processes.sharded or processes.zero), *alone],
            **given,
            max_steps=steps,
            max_epochs=-1,
            accumulate_grad_batches=accumulate,
            callbacks=callbacks,
            logger=[guard_(logger) for logger in loggers]
            if processes.rank == 0
            else DummyLogger(),  # callbacks ask all ranks for one
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=1 if measured else 0,
            val_check_interval=1,  # the module says after which steps
            check_val_every_n_epoch=None,
            use_distributed_sampler=False,
        )
    # Lightning's handlers would broadcast from inside of a handler, and requeue jobs; ours are in qvgen.stop_request.
    trainer._signal_connector.register_signal_handlers = lambda: None
    guard_world_size(trainer.world_size, expected=processes.world_size)
    return trainer


def _strategy(processes: Processes, *, on_gpu: bool) -> Strategy:
    if processes.world_size == 1:
        return OneDevice(device="cuda:0" if on_gpu else "cpu")
    cluster = GivenRanks(
        rank=processes.rank, world_size=processes.world_size, port=processes.port, world=processes.launched
    )
    if processes.sharded:
        strategy = ShardedStrategy(
            data_parallel_size=processes.world_size,  # Lightning's "auto" is the number of machines: 1
            tensor_parallel_size=1,
            process_group_backend=group_backend(on_gpu=on_gpu, shares_on_host=processes.shares_on_host),
            timeout=COLLECTIVE_TIMEOUT,
        )
        strategy.cluster_environment = cluster  # no argument of it
        strategy.shards, strategy.node_rank = processes.shards, cluster.node_rank()
        return strategy
    if processes.zero:
        return ZeroStrategy(
            on_gpu=on_gpu,
            cluster_environment=cluster,
            process_group_backend=group_backend(on_gpu=on_gpu, shares_on_host=False),
            timeout=COLLECTIVE_TIMEOUT,
        )
    return DataParallel(
        cluster_environment=cluster,
        process_group_backend=group_backend(on_gpu=on_gpu, shares_on_host=False),
        timeout=COLLECTIVE_TIMEOUT,
        broadcast_buffers=False,  # gates and ranks are computed alike everywhere
        gradient_as_bucket_view=True,
        find_unused_parameters=True,  # the factors of a Phi that is gone
    )


def trainer_arguments(options: TrainerConfig, *, gradient_clip: float | None, run_dir: Path) -> dict[str, Any]:
    """Arguments of Lightning's Trainer for the section ``trainer`` of a configuration.

    Args:
        options: The section.
        gradient_clip: ``optim.gradient_clip``: OptimizerModule clips by it, and callbacks can read it from the trainer.
        run_dir: A profile goes to its folder ``profiler``.
    """
    profilers = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
    profiler = None
    if options.profiler is not None:
        profiler = profilers[options.profiler](dirpath=run_dir / "profiler", filename=options.profiler)
    arguments: dict[str, Any] = {
        "gradient_clip_val": gradient_clip,
        "gradient_clip_algorithm": options.gradient_clip_algorithm,
        "profiler": profiler,
        "detect_anomaly": options.detect_anomaly,
        "log_every_n_steps": options.log_every_n_steps,
        "min_steps": options.min_steps,
        "default_root_dir": run_dir,
    }
    if options.deterministic:
        arguments["deterministic"] = options.deterministic
    if options.precision is not None:
        arguments["precision"] = options.precision
    return arguments


@contextmanager
def restored_settings() -> Iterator[None]:
    """Undo what a trainer sets for the whole process, so that the next job of a sweep begins as this one did."""
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    workspace, benchmark = os.environ.get("CUBLAS_WORKSPACE_CONFIG"), torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's advice on things that are decided here: devices, workers of the loader, cluster variables."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # It is the same number in all processes: rank 0's.
        warnings.filterwarnings("ignore", message=r".*self\.log\('val/relative_error', \.\.\., sync_dist=True\).*")
        warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
        warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified.*")
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*is deprecated.*")
        warnings.filterwarnings("ignore", message=".*_functional_collectives.* is deprecated.*")  # diffusers calls it
        warnings.filterwarnings("ignore", message=".*torch.distributed.all_gather_into_tensor.*")  # DeepSpeed calls it
        warnings.filterwarnings("ignore", message="Since DeepSpeed handles gradient clipping.*")  # ours leaves it to it
        # A prediction that is a view may not be changed in place: no family does, and the loss computes out of place.
        warnings.filterwarnings("ignore", message=".*FSDP2-wrapped module .* returned a view tensor.*")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def fit(trainer: lightning.Trainer, module: Any, data: Any, *, checkpoint: Path | None) -> None:
    """Train, from a checkpoint or from the module as it is.

    Raises:
        UserError: What Lightning finds wrong with how a callback was set up.
        KeyboardInterrupt: Ctrl-C; Lightning would end the process with the exit code of a failure.
    """
    on_interrupt = signal.getsignal(signal.SIGINT)
    with quiet_lightning():
        try:
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        except MisconfigurationException as error:
            raise UserError(one_line(error)) from error
        except SystemExit as end:
            if not trainer.interrupted:
                raise
            signal.signal(signal.SIGINT, on_interrupt)  # Lightning leaves it ignored
            raise KeyboardInterrupt from end
