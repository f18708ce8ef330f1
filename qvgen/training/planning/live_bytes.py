"""How many bytes of tensors are alive, followed operator by operator: what a device must hold besides the weights.

    with LiveBytes(known=model.parameters()) as live:
        loss = model(x); loss.backward()
    live.peak                    the largest sum, at any operator, of all storages that were made inside

A storage counts from the operator that returns it until nothing refers to it any more; what autograd saved is such a
reference. Views and in-place results share a storage and count once. It works on real tensors and, at no cost of memory, on
fake ones (:class:`torch._subclasses.FakeTensorMode`): the count is the same.

Left out: workspaces inside an operator (cuBLAS, flash attention), the allocator's rounding to 512 bytes and its
fragmentation, and storages that are resized later.

Example:
    >>> import torch
    >>> with LiveBytes() as live:
    ...     kept = torch.ones(10)
    ...     twice = (kept + kept).sum()
    >>> live.live, live.peak
    (44, 84)
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operators make while it is active, in this thread and in its backward passes.

    Args:
        known: Tensors whose storages never count, wherever they turn up: parameters, their gradients, buffers. So do
            all that an operator is given and that none returned before.

    Attributes:
        live: Bytes of the storages that are alive now.
        peak: The largest value of ``live`` so far.
        phase: Name of what is going on, set from outside; ``phase_peaks`` has the peak of each.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.phase = ""
        self.phase_peaks: dict[str, int] = {}
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in known:
            self._follow(tensor, counts=False)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; torch would call three functions more for each operator to say so."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, then look at what it returned; what it was given from outside is no new storage."""
        del types
        kwargs = kwargs or {}
        for tensor in tensors_of((args, tuple(kwargs.values()))):
            self._follow(tensor, counts=False)
        result = self.run(func, args, kwargs)
        for tensor in tensors_of((result,)):
            self._follow(tensor)
        return result

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operator."""
        return func(*args, **kwargs)

    def __exit__(self, *details: Any) -> None:
        """Stop following; what is still alive is forgotten."""
        super().__exit__(*details)
        self._references.clear()

    def __enter__(self) -> Self:
        """Start following."""
        super().__enter__()
        return self

    def _follow(self, tensor: Tensor, *, counts: bool = True) -> None:
        # torch keeps one Python object per storage for as long as the storage lives, also inside autograd's graph.
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes() if counts else 0
        self._references[key] = weakref.ref(storage, lambda _: self._forget(key))
        self.live += self._sizes[key]
        self.peak = max(self.peak, self.live)
        self.phase_peaks[self.phase] = max(self.phase_peaks.get(self.phase, 0), self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
        del self._references[key]


def tensors_of(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results, which are no deeper than lists of lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_of(value)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each storage once (real, meta or fake)."""
    storages: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[id(storage)] = storage
    return sum(storage.nbytes() for storage in storages.values())
