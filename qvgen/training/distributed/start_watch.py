"""Whether processes that another launcher started, and that help with a start, are still there.

No collective runs yet whose failure would tell, and srun lets the other tasks be where one is killed. So each process counts
in the store while it waits or helps, and rank 0 looks whether the counts still rise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from torch.distributed import Store

from qvgen.errors import UnfitEnvironmentError

LOST_SECONDS = 60.0
"""A process that has not counted for so long is taken for gone: it counts several times a second, whatever it computes."""
LOOK_SECONDS = 1.0


def give_sign(store: Store, *, rank: int) -> None:
    """As another process than rank 0: count once."""
    store.add(f"sign/{rank}", 1)


class StartWatch:
    """Looks after the processes that help with a start, as rank 0.

    Args:
        store: Where they count.
        ranks: Theirs.
        failure: What one of them said when it failed; None where none did.
    """

    def __init__(self, store: Store, *, ranks: Iterable[int], failure: Callable[[], str | None]) -> None:
        self._store, self._failure = store, failure
        now = time.monotonic()
        self._seen = dict.fromkeys(ranks, (0, now))
        self._looked = now

    def check(self) -> None:
        """Raise UnfitEnvironmentError where one of them failed, or counts no more."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        if why := self._failure():
            raise UnfitEnvironmentError(why)
        for rank, (count, at) in self._seen.items():
            found = self._store.add(f"sign/{rank}", 0)
            if found != count:
                self._seen[rank] = (found, now)
            elif now - at > LOST_SECONDS:
                raise UnfitEnvironmentError(
                    f"rank {rank} has given no sign of life for {now - at:.0f} s in the start; see its output"
                )
