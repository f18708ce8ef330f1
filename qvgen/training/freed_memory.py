"""Freed memory stays with the process while it trains on the CPU.

glibc gives large blocks back to the system as soon as they are freed and asks for them again a moment later, when every page
has to be found and cleared anew: 7 500 page faults in a micro-batch of the small model, an eighth of its processor time.
Blocks of up to :data:`LARGEST` bytes now come from the heap, of which up to :data:`KEPT` free bytes stay. A model's
weights are larger than that together, and what is freed of them goes back as before, piece by piece.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of these parameters in glibc's malloc.h."""

LARGEST = 64 << 20
KEPT = 512 << 20


def keep_freed_memory() -> bool:
    """Tell the C library; it holds for the process from now on. False where that is not glibc."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is None:
        return False
    return all(set_option(name, value) == 1 for name, value in ((_MMAP_THRESHOLD, LARGEST), (_TRIM_THRESHOLD, KEPT)))
