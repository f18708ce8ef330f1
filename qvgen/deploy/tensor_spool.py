"""Tensors of an export between their conversion and the end: in files that are mapped, and not in memory.

An export of a model of 14 billion parameters is as large as the memory of many machines. What was converted is written to a
file beside the export at once, and what comes back are the mapped pages of that file, which the system drops and reads again
as it needs to. So the memory that is needed at any moment is that of one layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

SMALL_BYTES = 2**18
"""Tensors below this size stay in memory: norms and biases, of which there are many."""


class TensorSpool:
    """A folder of tensors that were converted.

    Args:
        folder: Made if need be; whoever made the spool deletes it.
        small_bytes: Tensors below this size stay in memory.
    """

    def __init__(self, folder: Path, *, small_bytes: int = SMALL_BYTES) -> None:
        self.folder, self.small_bytes = folder, small_bytes
        self._count = 0

    def keep(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors, the large ones in mapped memory; one of the caller's own mapped pages is written again.

        Raises:
            OSError: The disk is full.
        """
        return {
            name: self._keep(tensor) if tensor.nbytes >= self.small_bytes else tensor
            for name, tensor in tensors.items()
        }

    def _keep(self, tensor: Tensor) -> Tensor:
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{self._count}.safetensors"
        self._count += 1
        save_file({"": tensor.detach().cpu().contiguous()}, path)
        return load_file(path)[""]
