"""What strategies have in common whose processes write a checkpoint together, each its rows, while training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import Strategy

from qvgen.training.checkpoint.background_save import BackgroundSave
from qvgen.training.checkpoint.file import RUN_KEY
from qvgen.training.checkpoint.folder import take_snapshot, write_folder
from qvgen.training.distributed.store_exchange import StoreExchange, default_store

IN_BACKGROUND = "in background"
"""Has a checkpoint written while training goes on."""


class WritesFolders(Strategy):
    """Part of a strategy, to be named before Lightning's own.

    Attributes:
        saving: The checkpoint that a thread writes, or wrote last; None before the first.
    """

    saving: BackgroundSave | None = None

    def shares_of(self, checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
        """What this process writes of a checkpoint: itself with :class:`~qvgen.training.checkpoint.part.Share` in it."""
        return checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a folder, together with all other processes.

        With :data:`IN_BACKGROUND` for ``storage_options`` a thread writes a copy of the state, :attr:`saving`. An earlier one
        is waited for.
        """
        if self.saving is not None:
            self.saving.wait()
        rank, world_size = self.global_rank, self.world_size  # type: ignore[attr-defined]  # of parallel strategies
        snapshot = take_snapshot(self.shares_of(checkpoint), run=checkpoint.get(RUN_KEY), rank=rank)
        ranks = {"rank": rank, "world_size": world_size}
        if storage_options != IN_BACKGROUND:
            write_folder(Path(filepath), snapshot, **ranks, exchange=self._exchange)
            return
        write = partial(write_folder, Path(filepath), snapshot.on_host(), **ranks, exchange=self._exchange)
        self.saving = BackgroundSave(Path(filepath), write)

    @cached_property
    def _exchange(self) -> StoreExchange:
        rank, world_size = self.global_rank, self.world_size  # type: ignore[attr-defined]
        return StoreExchange(default_store(), rank=rank, world_size=world_size)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Map the file; tensors are read when their rows are copied."""
        del weights_only
        loaded: dict[str, Any] = self.checkpoint_io.load_checkpoint(checkpoint_path)
        return loaded

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """False: a checkpoint is there before on_fit_start, and before an engine copies the weights."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: it is restored by ``load_optimizer_state_dict``."""
        return True
