"""Lightning's strategies for models that are whole on every device, with one change.

When a run goes on, Lightning brings the optimizer's state to the device after the optimizer has put it where it belongs:
moments that stay on the host (``optim.offload``) would all be on the device at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy


class OneDevice(SingleDeviceStrategy):
    """A single process."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Have each optimizer put its state where it belongs."""
        load_states_(self.optimizers, checkpoint)


class DataParallel(DDPStrategy):
    """Processes that average gradients."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Have each optimizer put its state where it belongs."""
        load_states_(self.optimizers, checkpoint)


def load_states_(optimizers: list[Any], checkpoint: Mapping[str, Any]) -> None:
    """Give optimizers the states of a checkpoint."""
    for optimizer, state in zip(optimizers, checkpoint["optimizer_states"], strict=True):
        optimizer.load_state_dict(state)
