"""The rows of a store that several processes measure: each once, by whoever takes it first.

A row that another process measures is left out and looked at again behind all others: it is in the file then, or that process
is gone and the row is free (:mod:`qvgen.data.claims`). Rows do not depend on each other, so who measures them changes no bit.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence

from qvgen import work_item
from qvgen.data.claims import POLL_SECONDS, Claims
from qvgen.evaluation.mixed_precision_files import Key, Sensitivity, SensitivityStore


class SharedRows:
    """The known rows of a store, and the share that this process measures.

    Args:
        store: The file.
        claims: The claims of this process in the file's folder.

    Attributes:
        rows: All that are known.
    """

    def __init__(self, store: SensitivityStore, claims: Claims) -> None:
        self.store, self._claims = store, claims
        self.rows: dict[Key, Sensitivity] = dict(store.read())
        self._seen_bytes = self._num_bytes()

    def missing(self, keys: Sequence[Key]) -> Iterator[Key]:
        """Rows to measure here; each is added before the next one is asked for. Ends when all are known."""
        left = list(keys)
        while left:
            elsewhere = []
            for key in left:
                if key in self.rows:
                    continue
                claim = self._claim(key)
                if not self._claims.take(claim):
                    elsewhere.append(key)
                    continue
                self._look()
                if key not in self.rows:
                    yield key
                self._claims.give_back(claim)
            if len(elsewhere) == len(left):
                work_item.wait()
                time.sleep(POLL_SECONDS)
            self._look()
            left = elsewhere

    def add(self, row: Sensitivity) -> None:
        """Keep a row that was measured."""
        with self._claims.held(self._claim(None)):  # one line at a time, on any disk
            self._look()
            self.store.add(row)
            self._seen_bytes = self._num_bytes()
        self.rows[row.key] = row

    def _look(self) -> None:
        """Take in what other processes have added."""
        if self._num_bytes() != self._seen_bytes:
            self._seen_bytes = self._num_bytes()
            found: Mapping[Key, Sensitivity] = self.store.read(warns=False)
            self.rows |= {key: row for key, row in found.items() if key not in self.rows}

    def _num_bytes(self) -> int:
        return self.store.path.stat().st_size if self.store.path.is_file() else 0

    def _claim(self, key: Key | None) -> str:
        return hashlib.sha256(json.dumps([self.store.path.name, key]).encode()).hexdigest()
