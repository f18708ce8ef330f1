"""Memory that was freed goes back to the system between layers.

glibc keeps freed blocks of up to 32 MB for later ones. Beside every layer a few small tensors stay, which are cut out of such
blocks, so that the next layer's do not fit into them any more: an export of 4 blocks of width 1536 grew by 186 MB with every
block, although no tensor of it was alive.
"""

from __future__ import annotations

import ctypes

LARGE_BYTES = 2**22
"""Freed memory below this is not worth a walk through the heap."""


def return_freed_memory(freed_bytes: int = LARGE_BYTES) -> None:
    """Give back every free page after so many bytes were freed; not where the C library is another one than glibc."""
    if freed_bytes < LARGE_BYTES:
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
