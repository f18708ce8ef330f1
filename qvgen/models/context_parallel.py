"""Transformers whose sequence of tokens several processes share out (context parallelism, by diffusers' hooks).

    tokens     t0 t1 t2 t3 t4 t5 t6 t7                             N = 2 processes with the same sample
    process 0  t0 t1 t2 t3    norms, Linears, feed-forward, cross-attention: a token at a time
    process 1              t4 t5 t6 t7
    attention  half of the heads each, over all tokens (Ulysses, arXiv 2309.14509): q, k, v and the result change places

The blocks' input is cut behind the embedding of patches and put together behind the last layer, so that every process has
the whole prediction, and the same loss. Each has its own tokens' part of every gradient: the whole one is their sum.
A fake-quantized input has its range from its own token, or a static one: cutting the sequence changes no code.

diffusers' ring attention needs the logarithm of the softmax's sum, which its own (torch's) attention does not return; with
that, it offers Ulysses alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh

from qvgen.errors import UserError

CONTEXT_CLASSES = ("WanTransformer3DModel",)
"""Classes of diffusers whose gradients over a shared sequence are held against one process by tests."""


def check_context(
    class_name: str,
    *,
    numbers: Mapping[str, Any],
    shapes: Sequence[tuple[int, int, int, int]],
    processes: int,
    name: str,
    remedy: str = "train on clips of another size",
    key: str = "strategy.context_parallel",
) -> None:
    """Refuse a model whose sequence can't be shared out over so many processes.

    Args:
        class_name: The transformer's class.
        numbers: Its ``num_attention_heads`` and ``patch_size``, where it is one of :data:`CONTEXT_CLASSES`.
        shapes: Latents of one sample [C, F, H, W], of every size.
        processes: Number of processes that share one sample out.
        name: The model's, for people.
        remedy: A way to other sizes.
        key: The key that says how many processes.

    Raises:
        UserError: Another class, heads or tokens that the processes do not divide, or an attention that can't.
    """
    given = f"{key}={processes} and model={name}"
    if class_name not in CONTEXT_CLASSES:
        raise UserError(
            f"{given}: a {class_name} can't share its sequence out; models of {', '.join(CONTEXT_CLASSES)} (wan, wan-14b, "
            "wan2.2-ti2v, wan2.2-a14b, small, tiny) can; leave it out"
        )
    heads = int(numbers["num_attention_heads"])
    if heads % processes:
        raise UserError(
            f"{given}: {heads} attention heads can't be divided by {processes}; write {_divisors(key, heads)}"
        )
    patch = numbers["patch_size"]
    for _, *sides in shapes:
        tokens = math.prod(side // size for side, size in zip(sides, patch, strict=True))
        if tokens % processes:
            raise UserError(
                f"{given}: latents of {' x '.join(map(str, sides))} are {tokens} tokens, which {processes} does not divide; "
                f"write {_divisors(key, math.gcd(tokens, heads))}, or {remedy}"
            )
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    backend, _ = _AttentionBackendRegistry.get_active_backend()
    if backend != AttentionBackendName.NATIVE:
        raise UserError(
            f"{given}: diffusers' attention backend is {backend.value}; write DIFFUSERS_ATTN_BACKEND=native"
        )


def _divisors(key: str, number: int) -> str:
    found = [str(size) for size in range(2, number + 1) if number % size == 0]
    return f"{key}={found[0] if found else 1}"


class SharedSequence:
    """Hooks that share out the sequence of models, while they are on; a collective to make.

    Args:
        models: Transformers of one of :data:`CONTEXT_CLASSES`.
        processes: Size of a group that shares one sample out: ranks that follow each other.
        device: Where they compute.
    """

    def __init__(self, models: Sequence[nn.Module], *, processes: int, device: torch.device) -> None:
        from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig

        world = distributed.get_world_size()
        mesh = DeviceMesh(
            device.type,
            torch.arange(world).reshape(-1, 1, processes),
            mesh_dim_names=("data", "ring", "ulysses"),
        )
        self._config = ParallelConfig(
            context_parallel_config=ContextParallelConfig(ulysses_degree=processes, mesh=mesh)
        )
        self._config.setup(distributed.get_rank(), world, device, mesh=mesh)
        self._models: list[Any] = list(models)
        self._attention: Any = None
        self._is_on = False

    def of(self, models: Sequence[nn.Module]) -> SharedSequence:
        """The same for other models; no collective."""
        other = copy(self)
        other._models, other._attention, other._is_on = list(models), None, False
        return other

    def apply_(self) -> None:
        """Share sequences out from the next call on; until :meth:`remove_`, also in calls of a backward pass."""
        from diffusers.hooks.context_parallel import apply_context_parallel
        from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

        if not self._is_on:
            self._attention = _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE]
            _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE] = partial(_of_one_type, self._attention)
            for model in self._models:
                self._tell(model, self._config)
                apply_context_parallel(model, self._config.context_parallel_config, _plan(model))
        self._is_on = True

    def remove_(self) -> None:
        """Leave the models as they were."""
        from diffusers.hooks.context_parallel import remove_context_parallel
        from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

        if self._is_on:
            _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE] = self._attention
            for model in self._models:
                remove_context_parallel(model, _plan(model))
                self._tell(model, None)
        self._is_on = False

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Share sequences out while the block runs: in calls without a backward pass."""
        self.apply_()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", message=".*_functional_collectives.* is deprecated.*"
                )  # diffusers calls it
                yield
        finally:
            self.remove_()

    @staticmethod
    def _tell(model: nn.Module, parallel: Any) -> None:
        for module in model.modules():
            processor = getattr(module, "processor", None)
            if hasattr(processor, "_parallel_config"):
                processor._parallel_config = parallel


def _of_one_type(attention: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Attention of inputs in autocast's type, to which it would cast them itself: its backward pass has no autocast.

    On a GPU queries and keys come in float32 from their norm, and values in bfloat16 from their Linear.
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return attention(query=query, key=key, value=value, **options)


def _plan(model: Any) -> dict[str, Any]:
    """The class's plan without timesteps, of which there is one for each sample and not for each token."""
    return {name: entry for name, entry in model._cp_plan.items() if name}
