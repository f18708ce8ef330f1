"""The cases of an evaluation that are still to be done, shared out between processes by claims (:mod:`qvgen.data.claims`).

    process 1    case 0           case 2  case 3 ...        what a process takes, it claims until its file is there
    process 2           case 1                   case 4     what another one has claimed is looked at again behind the rest

All processes do the same: those of one command, tasks of a launcher on several machines, and other commands on the same
folder. Whoever comes to the end finds every file there; what a killed process had claimed is free at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Generic, TypeVar

from qvgen.data.claim_wait import ClaimWait
from qvgen.data.claims import Claims

C = TypeVar("C", bound=Hashable)


class SharedCases(Generic[C]):
    """The cases that this process shall make, one after the other: each is made when the next one is asked for.

    Args:
        cases: All of them, in order; a video's, or another thing that is made whole.
        claims: The claims of the folder that they are made in.
        key: A case's own key, a SHA-256 in hexadecimal digits.
        is_there: Whether a case is made, by any process.

    Attributes:
        cases: All of them.
    """

    def __init__(
        self, cases: Sequence[C], *, claims: Claims, key: Callable[[C], str], is_there: Callable[[C], bool]
    ) -> None:
        self.cases = tuple(cases)
        self._claims, self._key, self._is_there = claims, key, is_there
        self._wait = ClaimWait(claims)
        self._there = {case for case in cases if is_there(case)}

    @property
    def num_there(self) -> int:
        """How many were there when this process looked last."""
        return len(self._there)

    def __iter__(self) -> Iterator[C]:
        """Cases that are not there, and that no other process makes; when there is none left, all are there."""
        left = [case for case in self.cases if case not in self._there]
        while left:
            elsewhere = []
            for case in left:
                if self._is_there(case):
                    self._there.add(case)
                    continue
                if not self._claims.take(self._key(case)):
                    elsewhere.append(case)
                    continue
                try:
                    if not self._is_there(case):  # its maker may have been done since
                        yield case
                    self._there.add(case)
                finally:
                    self._claims.give_back(self._key(case))
            if len(elsewhere) == len(left):
                self._wait.wait(self._key(left[0]))
            left = elsewhere
