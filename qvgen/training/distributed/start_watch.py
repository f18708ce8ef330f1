"""Whether processes that another launcher started, and that help with a start, are still there.

No collective runs yet whose failure would tell. Connections tell who is gone (:mod:`qvgen.training.distributed.peer_links`);
one that is stopped, or hangs, gives no sign.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from qvgen.errors import UnfitEnvironmentError
from qvgen.training.distributed.peer_links import LinksToOthers

LOST_SECONDS = 60.0
"""A process that has given no sign for so long is not waited for: it gives one a second, whatever it computes."""


class StartWatch:
    """Looks after the processes that help with a start, as rank 0.

    Args:
        links: Rank 0's connections.
        failure: What one of them said when it failed; None where none did.
    """

    def __init__(self, links: LinksToOthers, *, failure: Callable[[], str | None]) -> None:
        self._links, self._failure, self._began = links, failure, time.monotonic()

    def check(self) -> None:
        """Raise UnfitEnvironmentError where one of them failed, is gone, or gives no sign any more."""
        if why := self._links.lost or self._failure():
            raise UnfitEnvironmentError(why)
        for rank, at in self._links.signs().items():
            silent = time.monotonic() - max(at, self._began)
            if silent > LOST_SECONDS:
                raise UnfitEnvironmentError(
                    f"rank {rank} has given no sign of life for {silent:.0f} s in the start; see its output"
                )
