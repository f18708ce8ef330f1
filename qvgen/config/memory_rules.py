"""Which options that save memory can't be used together, and why."""

from __future__ import annotations

from qvgen.config.ema_section import EmaConfig
from qvgen.config.sections import OptimConfig
from qvgen.config.strategy_section import StrategyConfig
from qvgen.errors import UserError

ONE_PROCESS = "its processes send gradients in the type of the weights"


def check_memory_options(*, optim: OptimConfig, strategy: StrategyConfig, ema: EmaConfig, trains: str | None) -> None:
    """Raise UserError for options that no run can have together.

    Args:
        optim: The optimizer.
        strategy: How processes share the work.
        ema: The average.
        trains: What the method trains (:data:`qvgen.methods.base.Trains`); None where the method is not built yet.
    """
    for name in ("masters", "gradients"):
        if getattr(optim, name) == "bfloat16" and strategy.name == "fsdp":
            raise UserError(
                f"optim.{name}=bfloat16 and strategy=fsdp: FSDP2 shares out tensors of one type together, and scales are "
                f"float32; write optim.{name}=float32, a share of which is smaller already, or strategy=ddp"
            )
    if optim.gradients != optim.masters and strategy.name == "ddp":
        raise UserError(
            f"optim.gradients={optim.gradients} with optim.masters={optim.masters} and strategy=ddp: {ONE_PROCESS}; write "
            f"optim.gradients={optim.masters}, or strategy=single"
        )
    if strategy.teacher_offload and strategy.name == "fsdp":
        raise UserError(
            "strategy.teacher_offload=true and strategy=fsdp: the teacher is shared out already, and FSDP2 gathers its "
            "blocks from devices; leave one of them out"
        )
    if trains is None or trains == "student":
        return
    given = {
        "optim.masters=bfloat16": optim.masters != "float32",
        "optim.gradients=bfloat16": optim.gradients != "float32",
        "strategy.teacher_offload=true": strategy.teacher_offload,
        f"ema.decay={ema.decay}": ema.decay is not None,
    }
    for option, is_given in given.items():
        if is_given and trains != "nothing":
            raise UserError(
                f"{option} is for methods that train quantized layers, and this one trains a {trains}; leave it out"
            )
