"""The section ``trainer``: options of Lightning's Trainer that a run passes on, and why it takes none of the others.

Every argument of ``lightning.Trainer`` is either a field here or in :data:`REFUSED`: another key of qvgen has it, or a run
would no longer have the same bits when it is done again or continued.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from qvgen.config.schema.may_differ import MayDiffer
from qvgen.config.schema.value_range import Range, check_ranges
from qvgen.errors import UserError

_COUNTED = "a run is counted in optimizer steps; write steps=..."
_SAMPLED = "the samples of a step depend on seed and step alone, so that a run can be continued exactly"

REFUSED: Mapping[str, str] = {
    "accelerator": "a GPU is used where there is one; hide it with CUDA_VISIBLE_DEVICES= to train on the CPU",
    "strategy": "it is a group of its own; write strategy=ddp or strategy=fsdp",
    "devices": "it is a key of its own; write devices=2 strategy=ddp for example",
    "num_nodes": "it is a key of its own; write num_nodes=2 for example",
    "logger": "it is a group of its own; write logger=csv, or +logger.NAME._target_=... for one of Lightning's",
    "callbacks": "they are a section of their own; write +callbacks.NAME._target_=...",
    "fast_dev_run": "dry_run=true checks everything, and steps=2 makes a short run",
    "max_epochs": _COUNTED,
    "min_epochs": _COUNTED,
    "max_steps": _COUNTED,
    "max_time": "a clock would decide which model comes out; a signal ends a run with everything saved, to be continued by "
    "resume=true (timeout --signal=TERM 12h qvgen train ...)",
    "limit_train_batches": _COUNTED,
    "limit_val_batches": "evaluation.samples says how much is measured, evaluation.every_steps how often",
    "limit_test_batches": "a run has no test loop; its report measures evaluation.samples",
    "limit_predict_batches": "a run has no loop of predictions; evaluation.videos says how many videos are made",
    "overfit_batches": f"{_SAMPLED}; give data.path a few clips",
    "val_check_interval": "write evaluation.every_steps=..., in optimizer steps",
    "check_val_every_n_epoch": "write evaluation.every_steps=..., in optimizer steps",
    "num_sanity_val_steps": "the PTQ start is measured whole before the first step",
    "enable_checkpointing": "write checkpoint.every_steps=... and checkpoint.keep=...; a run always can be continued",
    "enable_progress_bar": "the bar is qvgen's own, and lines where stderr is no terminal",
    "enable_model_summary": "the start of a run and its report say what was quantized",
    "accumulate_grad_batches": "it is a key of its own; write accumulate=...",
    "gradient_clip_val": "it is a key of the optimizer; write optim.gradient_clip=...",
    "benchmark": "cuDNN would choose its kernels by a clock, and other kernels round in another way",
    "inference_mode": "it has no effect while a model is trained",
    "use_distributed_sampler": _SAMPLED,
    "barebones": "it would take metrics and checkpoints away",
    "plugins": "checkpoints and processes are qvgen's own, so that a run can be continued and stopped",
    "sync_batchnorm": "the models have no batch norm",
    "reload_dataloaders_every_n_epochs": _SAMPLED,
    "default_root_dir": "everything is in the run's folder; write run_dir=...",
    "enable_autolog_hparams": "the configuration is in config.yaml, and wandb has it",
    "model_registry": "nothing is uploaded; the run's folder holds the packed model",
}
"""Arguments of Lightning's Trainer that the section does not take -> why, and what to write instead."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Options of Lightning's Trainer that are passed on.

    Attributes:
        precision: ``32-true``, or ``bf16-mixed``: bfloat16 autocast over float32 masters; None: the first on a CPU, the
            second on a GPU. Others are refused: float16 skips steps that Phi's schedule has counted, quantizers need float32.
        gradient_clip_algorithm: ``norm`` scales all gradients down together, ``value`` cuts each entry; the limit of both is
            optim.gradient_clip.
        profiler: Writes where the time goes to run_dir/profiler; None: nothing.
        detect_anomaly: True names the operation in whose backward pass a gradient became NaN; takes several times as long.
        deterministic: True has torch raise an error for an operation without a deterministic form, ``warn`` a warning.
        log_every_n_steps: Optimizer steps between two rows that the loggers get; metrics.csv has every step.
        min_steps: No callback can end the training before so many steps; None: as soon as Phi is gone.
    """

    precision: Literal["32-true", "bf16-mixed"] | None
    gradient_clip_algorithm: Literal["norm", "value"]
    profiler: Annotated[Literal["simple", "advanced", "pytorch"] | None, MayDiffer.FREE]
    detect_anomaly: Annotated[bool, MayDiffer.FREE]
    deterministic: Literal[False, True, "warn"]
    log_every_n_steps: Annotated[int, Range("> 0"), MayDiffer.FREE]
    min_steps: Annotated[int | None, Range("> 0")]

    def __post_init__(self) -> None:
        check_ranges(self, section="trainer")


def refuse_option(name: str) -> None:
    """Raise UserError where a name is an argument of Lightning's Trainer that the section does not take."""
    if name in REFUSED:
        raise UserError(f"trainer.{name} is not passed on: {REFUSED[name]}")


def check_options(section: object) -> None:
    """Raise UserError where a section ``trainer`` of a configuration holds an option that is not passed on."""
    for name in section if isinstance(section, Mapping) else ():
        refuse_option(str(name))
