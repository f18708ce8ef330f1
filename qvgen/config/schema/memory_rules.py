"""Which options that save memory can't be used together, and why."""

from __future__ import annotations

from qvgen.config.schema.ema import EmaConfig
from qvgen.config.schema.sections import OptimConfig
from qvgen.config.schema.strategy import StrategyConfig
from qvgen.errors import UserError

ONE_PROCESS = "its processes send gradients in the type of the weights"


def one_process_reason(*, gradients: str, masters: str) -> str | None:
    """Why a run with such types is one process, neither ``ddp`` nor sharded; None where it may be several."""
    return None if gradients == masters else f"optim.gradients={gradients} is for one process with {masters} masters"


def refused_sharding(*, optim: OptimConfig, strategy: StrategyConfig) -> str | None:
    """The line that says why a model can't be shared out over processes, and what to write; None where it can."""
    shown = f"strategy={strategy.name}"
    for name in ("masters", "gradients"):
        if getattr(optim, name) == "bfloat16":
            return (
                f"optim.{name}=bfloat16 and {shown}: FSDP2 shares out tensors of one type together, and scales are "
                f"float32; write optim.{name}=float32, a share of which is smaller already, or strategy=ddp"
            )
    if strategy.teacher_offload:
        return (
            f"strategy.teacher_offload=true and {shown}: the teacher is shared out already, and FSDP2 gathers its "
            "blocks from devices; leave one of them out"
        )
    return None


def refused_zero(*, optim: OptimConfig, strategy: StrategyConfig) -> str | None:
    """The line that says what DeepSpeed can't do with these options, and what to write; None where it can all."""
    shown = "strategy=deepspeed"
    for name in ("masters", "gradients"):
        if getattr(optim, name) == "bfloat16":
            return (
                f"optim.{name}=bfloat16 and {shown}, which shares out float32 masters and gradients; leave it out, or write "
                "strategy=ddp"
            )
    if optim.name != "adamw":
        return f"optim.name={optim.name} and {shown}, which steps flat pieces of many tensors; write optim.name=adamw"
    if optim.offload:
        return (
            f"optim.offload=true and {shown}, which has masters and moments of its own; leave it out, or write strategy=fsdp "
            "strategy.cpu_offload=true"
        )
    if strategy.context_parallel > 1:
        return (
            f"strategy.context_parallel={strategy.context_parallel} and {shown}: not built; leave one of them out, or write "
            "strategy=fsdp"
        )
    if strategy.compile:
        return f"strategy.compile=true and {shown}: not built; leave one of them out"
    return None


def check_memory_options(*, optim: OptimConfig, strategy: StrategyConfig, ema: EmaConfig, trains: str | None) -> None:
    """Raise UserError for options that no run can have together.

    Args:
        optim: The optimizer.
        strategy: How processes share the work.
        ema: The average.
        trains: What the method trains (:data:`qvgen.methods.base.Trains`); None where the method is not built yet.
    """
    if refusal := refused_sharding(optim=optim, strategy=strategy) if strategy.is_sharded else None:
        raise UserError(refusal)
    if refusal := refused_zero(optim=optim, strategy=strategy) if strategy.name == "deepspeed" else None:
        raise UserError(refusal)
    if strategy.name in ("ddp", "auto") and one_process_reason(gradients=optim.gradients, masters=optim.masters):
        raise UserError(
            f"optim.gradients={optim.gradients} with optim.masters={optim.masters} and strategy={strategy.name}: "
            f"{ONE_PROCESS}; write optim.gradients={optim.masters}, or strategy=single"
        )
    if trains is None or trains == "student":
        return
    given = {
        "optim.masters=bfloat16": optim.masters != "float32",
        "optim.gradients=bfloat16": optim.gradients != "float32",
        "strategy.teacher_offload=true": strategy.teacher_offload,
        "strategy.gather=codes": strategy.gather == "codes",
        f"ema.decay={ema.decay}": ema.decay is not None,
    }
    for option, is_given in given.items():
        if is_given and trains != "nothing":
            raise UserError(
                f"{option} is for methods that train quantized layers, and this one trains a {trains}; leave it out"
            )
