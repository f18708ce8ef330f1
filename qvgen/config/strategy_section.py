"""The section ``strategy``: how processes share the work, and what they give for memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from qvgen.config.value_range import Range, check_ranges


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """How processes share the work, and what they give for memory.

    Attributes:
        name: ``single``, ``ddp`` (every process holds everything) or ``fsdp`` (weights, gradients, moments and teacher are
            shared out over the processes).
        gradient_checkpointing: Keep only the blocks' inputs and compute the rest again in the backward pass: the same bits
            for about a third more time.
        keep_attention: With gradient checkpointing, keep the outputs of attention too, so that it is computed once: the same
            bits, for tokens x channels numbers of each attention layer. A plan (``dry_run``) shows what it saves and costs.
        teacher_offload: Keep the teacher's blocks in the host's memory; each comes to the device when its turn is near and
            goes when it is done, for the same bits.
        compile: Run the blocks under ``torch.compile``, one graph for all of them: minutes of compilation at the first step,
            other bits than eager runs, the same among compiled ones. Not run on a GPU yet.
        threads: CPU threads of each process, from the PTQ start to the report. The last bit of a sum depends on how many
            threads share it, so OMP_NUM_THREADS has no say: a run gives the same bits on every machine, and another number
            of threads trains other bits.
    """

    name: Literal["single", "ddp", "fsdp"]
    gradient_checkpointing: bool
    keep_attention: bool
    teacher_offload: bool
    compile: bool
    threads: Annotated[int, Range("> 0")]

    def __post_init__(self) -> None:
        check_ranges(self, section="strategy")
        if self.compile and self.gradient_checkpointing and self.keep_attention:
            raise ValueError(
                "strategy.keep_attention=true looks at operators one by one, and strategy.compile=true makes one of a block; "
                "leave one of them out"
            )
