"""Tensors that lie in the host's memory and visit a device, one group after another.

    host     0 1 2 3 ...        group i + 1 is on its way while group i is computed, and what was computed goes home beside it
    device     0 1 2 3 ...      a second stream of copies on CUDA; on other devices copies wait for each other

Copies change no bit. On a GPU the host's tensors are pinned, so that copies need no further one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def to_host(value: Tensor, *, is_pinned: bool) -> Tensor:
    """A copy of a tensor in the host's memory; a tensor that lies there is copied too."""
    return torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=is_pinned).copy_(value)


class HostStream:
    """The way between host and one device.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def visits(self, groups: Sequence[Sequence[Tensor]]) -> Iterator[list[Tensor]]:
        """Each group's tensors on the device, in turn; what was changed in place is written back when the next is asked for.

        Args:
            groups: Tensors in the host's memory. Two groups and a half are on the device at once.
        """
        ahead = self._fetch(groups[0]) if groups else None
        for index, group in enumerate(groups):
            assert ahead is not None
            here, ahead = ahead, self._fetch(groups[index + 1]) if index + 1 < len(groups) else None
            self._wait(here)
            yield here[0]
            self._bring_home(here[0], group)
        if self._stream is not None:
            self._stream.synchronize()  # a checkpoint may read the host's tensors next

    def fetch(self, group: Sequence[Tensor]) -> Any:
        """Begin to copy tensors to the device; :meth:`arrived` has them."""
        return self._fetch(group)

    def arrived(self, fetched: Any) -> list[Tensor]:
        """The tensors of a :meth:`fetch`, which what is computed next may read."""
        self._wait(fetched)
        tensors: list[Tensor] = fetched[0]
        return tensors

    def _copying(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _fetch(self, group: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        with self._copying():
            copies = [tensor.to(self.device, non_blocking=True) for tensor in group]
            event = None if self._stream is None else self._stream.record_event()
        return copies, event

    def _wait(self, fetched: tuple[list[Tensor], Any]) -> None:
        copies, event = fetched
        if event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            for copy in copies:
                copy.record_stream(current)  # its memory is used again once both streams are done with it

    def _bring_home(self, copies: Sequence[Tensor], group: Sequence[Tensor]) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with self._copying():
            for copy, home in zip(copies, group, strict=True):
                if copy is not home:  # the host is the device
                    home.copy_(copy, non_blocking=True)
