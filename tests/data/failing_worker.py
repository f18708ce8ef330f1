"""What a worker of qvgen.data.clip_process may meet, by name of the "file": tests pass these functions to it."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from typing import Any

from qvgen.data.clip_process import answer as usual_answer


def answer(request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Fail as the file's name says, or answer as the real worker does."""
    path = request["path"]
    if path.endswith("sleeps"):
        time.sleep(1000)
    elif path.endswith("holds_the_lock"):
        ctypes.PyDLL(None).sleep(1000)  # PyDLL keeps the interpreter's lock
    elif path.endswith("crashes"):
        os.kill(os.getpid(), signal.SIGSEGV)
    elif path.endswith("a_bug"):
        raise KeyError("a bug")
    elif path.endswith("pid"):
        return {"pid": os.getpid()}, b""
    return usual_answer(request)
