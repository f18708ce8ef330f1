"""What processes that write one checkpoint tell each other, through the store by which they found each other.

It is no collective: a thread can wait for the others while training computes, and messages are JSON.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

from torch import distributed
from torch.distributed import PrefixStore, Store

from qvgen.errors import UnfitEnvironmentError, one_line

PATIENCE = timedelta(days=7)
"""How long a process waits for another that still writes; whoever watches the processes ends them where one is gone."""


class StoreExchange:
    """Gives every process the values of all, by rank; each call is a round, which all processes take part in.

    Args:
        store: The processes' own.
        rank: This process.
        world_size: All.

    Example:
        >>> from torch.distributed import HashStore
        >>> StoreExchange(HashStore(), rank=0, world_size=1)({"done": True})
        [{'done': True}]
    """

    def __init__(self, store: Store, *, rank: int, world_size: int) -> None:
        self._store = PrefixStore("qvgen/checkpoint", store)
        self.rank, self.world_size, self._round = rank, world_size, 0

    def __call__(self, value: Any) -> list[Any]:
        """Say a value and wait for those of the others.

        Raises:
            RuntimeError: The store is gone.
        """
        self._round += 1
        keys = [f"{self._round}/{rank}" for rank in range(self.world_size)]
        try:
            self._store.set(keys[self.rank], json.dumps(value))
            self._store.wait(keys, PATIENCE)
            found = [json.loads(self._store.get(key)) for key in keys]
            if self._round > 1:  # all have read it: they are in this round
                self._store.delete_key(f"{self._round - 1}/{self.rank}")
        except (RuntimeError, OSError) as error:
            raise UnfitEnvironmentError(
                f"the processes that save a checkpoint lost each other: {one_line(error)}"
            ) from error
        return found


def default_store() -> Store:
    """A connection of its own to the store of the process group: a wait in it keeps nobody else from asking."""
    store: Store = distributed.distributed_c10d._get_default_store().clone()
    return store
