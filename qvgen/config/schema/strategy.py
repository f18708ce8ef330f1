"""The section ``strategy``: how processes share the work, and what they give for memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from qvgen.config.schema.may_differ import MayDiffer
from qvgen.config.schema.value_range import Range, check_ranges

STRATEGIES = ("single", "ddp", "fsdp", "hsdp")
"""The strategies that ``auto`` can stand for."""


SHARDED_DEFAULTS = {
    "reshard_after_forward": True,
    "prefetch": None,
    "cpu_offload": False,
    "gather": "weights",
    "low_host_memory": False,
}
"""Keys of strategies that share parameters out, which other strategies refuse, and what stands there by default."""


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """How processes share the work, and what they give for memory.

    Attributes:
        name: ``single``, ``ddp`` (every process holds everything), ``fsdp`` (weights, gradients, moments and teacher are
            shared out over the processes), ``hsdp`` (shared out over the devices of a group, and each group holds
            everything), ``deepspeed`` (by that library, which is to be installed: gradients, moments and the masters that
            are stepped are shared out, ZeRO-2) or ``auto``: the first of single, ddp, hsdp (several nodes) and fsdp that
            fits by the run's plan.
        shard_size: Processes of a group of ``hsdp``: a divisor of ``devices``, or a multiple that divides the world; null:
            all devices of a node.
        reshard_after_forward: What ``fsdp`` and ``hsdp`` keep of a gathered block between its two passes; true: their share,
            and the block is gathered again; false: all of it, one gathering less for the memory of the whole
            student; a number: a share of groups of so many processes, gathered again inside of them.
        prefetch: How many blocks ``fsdp`` and ``hsdp`` gather ahead of the one that computes, in both passes, each in memory
            of its own; null: as FSDP2 does by itself, one ahead in the backward pass.
        cpu_offload: With ``fsdp`` and ``hsdp``, keep every process's share of weights, gradients and moments, and of the
            teacher, in the host's memory, where the optimizer step is computed.
        gather: What ``fsdp`` and ``hsdp`` send of quantized layers for a forward pass: ``weights``, 4 bytes of each, or
            ``codes``, half a byte (up to 4 bits) or one, from which the same values are made; the backward pass gets weights.
        low_host_memory: With ``fsdp`` and ``hsdp``, no process ever holds a whole model on its host: the start is made layer
            by layer, each process reads its rows from files, and the run ends with its last checkpoint, which ``qvgen fold``
            packs. The same bits.
        context_parallel: Processes that share one sample's tokens out (Ulysses), for videos too long for one device: each has
            its part of the activations, and heads of attention change places. A divisor of the processes, of the attention
            heads and of the tokens. Wan's transformers have it.
        gradient_checkpointing: Keep only the blocks' inputs and compute the rest again in the backward pass: the same bits
            for about a third more time.
        keep_attention: With gradient checkpointing, keep the outputs of attention too, so that it is computed once: the same
            bits, for tokens x channels numbers of each attention layer. A plan (``dry_run``) shows what it saves and costs.
        teacher_offload: Keep the teacher's blocks in the host's memory; each comes to the device when its turn is near and
            goes when it is done, for the same bits.
        compile: Run the blocks under ``torch.compile``, one graph for all of them: minutes of compilation at the first step,
            other bits than eager runs, the same among compiled ones. Not run on a GPU yet.
        int8_products: Where the forward product of a layer without Phi takes codes as 8-bit integers, for the same bits:
            ``auto``, on CPUs with VNNI; ``always``, on GPUs too (not run on one yet); ``never``.
        threads: CPU threads of each process, from the PTQ start to the report. The last bit of a sum depends on how many
            threads share it, so OMP_NUM_THREADS has no say: a run gives the same bits on every machine, and another number
            of threads trains other bits.
    """

    name: Annotated[Literal["auto", "single", "ddp", "fsdp", "hsdp", "deepspeed"], MayDiffer.WORLD]
    shard_size: Annotated[int | None, Range("> 0"), MayDiffer.WORLD]
    reshard_after_forward: Annotated[bool | int, MayDiffer.FREE]
    prefetch: Annotated[int | None, Range("> 0"), MayDiffer.FREE]
    cpu_offload: Annotated[bool, MayDiffer.WORLD]
    gather: Annotated[Literal["weights", "codes"], MayDiffer.FREE]
    low_host_memory: Annotated[bool, MayDiffer.FREE]
    context_parallel: Annotated[int, Range("> 0"), MayDiffer.WORLD]
    gradient_checkpointing: bool
    keep_attention: bool
    teacher_offload: bool
    compile: bool
    int8_products: Annotated[Literal["auto", "always", "never"], MayDiffer.FREE]
    threads: Annotated[int, Range("> 0")]

    def __post_init__(self) -> None:
        check_ranges(self, section="strategy")
        if self.shard_size is not None and self.name != "hsdp":
            raise ValueError(
                f"strategy.shard_size={self.shard_size} is of strategy=hsdp, and strategy={self.name}; leave it out, or "
                "write strategy=hsdp"
            )
        for key, default in SHARDED_DEFAULTS.items():
            value = getattr(self, key)
            if not self.is_sharded and (type(value), value) != (type(default), default):  # 1 == True
                raise ValueError(
                    f"strategy.{key}={_written(value)} is of strategies that share a model out, fsdp and hsdp, and "
                    f"strategy={self.name}; leave it out, or write strategy=fsdp"
                )
        if self.gather == "codes" and self.reshard_after_forward is not True:
            raise ValueError(
                f"strategy.gather=codes and strategy.reshard_after_forward={_written(self.reshard_after_forward)}: what is "
                "kept of a forward pass are codes, and the backward pass needs weights; leave one of them out"
            )
        for key in ("compile", "keep_attention"):
            if self.context_parallel > 1 and getattr(self, key):
                raise ValueError(
                    f"strategy.context_parallel={self.context_parallel} and strategy.{key}=true: attention over a shared "
                    "sequence is no operator that it knows; leave one of them out"
                )
        if self.compile and self.gradient_checkpointing and self.keep_attention:
            raise ValueError(
                "strategy.keep_attention=true looks at operators one by one, and strategy.compile=true makes one of a block; "
                "leave one of them out"
            )

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are shared out over processes; ``auto`` shares out nothing until a plan has chosen."""
        return self.name in ("fsdp", "hsdp")

    def shards(self, *, devices: int, nodes: int) -> int:
        """Over how many processes parameters are shared out; 1: each holds all of them.

        Args:
            devices: Processes of a node.
            nodes: Machines.

        Raises:
            ValueError: ``hsdp`` and no group of that size, or no such group for ``reshard_after_forward``; the message says
                what to write.

        Example:
            >>> def shards(name, size, **world):
            ...     return StrategyConfig(name=name, shard_size=size, gradient_checkpointing=False, keep_attention=False,
            ...         teacher_offload=False, compile=False, int8_products="auto", threads=1, context_parallel=1,
            ...         **SHARDED_DEFAULTS).shards(**world)
            >>> [shards(*given, devices=8, nodes=4) for given in (("ddp", None), ("fsdp", None), ("hsdp", None), ("hsdp", 2))]
            [1, 32, 8, 2]
        """
        size = self._group_size(devices=devices, nodes=nodes)
        group = self.reshard_after_forward
        if isinstance(group, bool):
            return size
        if not 1 < group < size or size % group:
            sizes = [str(number) for number in range(2, size) if size % number == 0]
            fitting = f"write one of {', '.join(sizes)}, or true or false" if sizes else "write true or false"
            raise ValueError(
                f"strategy.reshard_after_forward={group} is no group of processes that divides the {size} which share the "
                f"model out; {fitting}"
            )
        return size

    def _group_size(self, *, devices: int, nodes: int) -> int:
        """See :meth:`shards`."""
        world = devices * nodes
        if self.name != "hsdp":
            return world if self.is_sharded else 1
        size = devices if self.shard_size is None else self.shard_size
        if nodes == 1 and self.shard_size is None:
            raise ValueError(
                f"strategy=hsdp shares a model out inside a node and repeats it over nodes, and num_nodes=1; write "
                f"{_good_size(devices, world)}"
            )
        if not 1 < size < world:
            which = "one process shares nothing" if size < 2 else "that is all of them, strategy=fsdp"
            raise ValueError(
                f"strategy=hsdp with groups of {size} of {world} processes: {which}; write {_good_size(devices, world)}"
            )
        if world % size or (devices % size and size % devices):
            raise ValueError(
                f"strategy.shard_size={size} neither divides the {devices} devices of a node nor is a multiple of them that "
                f"divides all {world} processes; write {_good_size(devices, world)}"
            )
        return size


def _written(value: object) -> str:
    """A value as a command has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _good_size(devices: int, world: int) -> str:
    """The words that name a good size in place of one that is none."""
    sizes = [size for size in range(2, world) if world % size == 0 and (devices % size == 0 or size % devices == 0)]
    inside = [size for size in sizes if size <= devices]
    return f"for example strategy.shard_size={(inside or sizes)[-1]}, or strategy=fsdp" if sizes else "strategy=fsdp"
