"""The verbs: straight stories of steps. The only rooms that know the order of things."""

from __future__ import annotations

import atexit
import gc
import importlib
import keyword
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


def _end_quietly() -> None:
    """Send what C++ libraries say after the end of Python nowhere, where Triton is loaded.

    Its binding counts objects at the end, and takes those for lost that :func:`import_verb` keeps from the collector: pages
    of warnings behind the last line of every command. To look through a million objects once more would take two seconds.
    """
    if "triton" in sys.modules and sys.stderr is not None:
        sys.stderr.flush()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)


atexit.register(_end_quietly)  # before the verbs' libraries are imported, so that it runs after what these register


def module_name(verb: str) -> str:
    """The name of a verb's file: ``report_card`` of report-card, and ``import_`` of import, which is a word of Python."""
    return f"{verb}_" if keyword.iskeyword(verb) else verb.replace("-", "_")


def import_verb(verb: str) -> ModuleType:
    """Import the file of a verb, and with it torch and diffusers where the verb needs them."""
    name = f"{__name__}.{module_name(verb)}"
    if name in sys.modules:
        return sys.modules[name]
    with importing():
        return importlib.import_module(name)


def import_worker(verb: str) -> ModuleType:
    """Import the file of a verb, and what its further processes need besides."""
    module = import_verb(verb)
    for part in _WORKER_PARTS.get(verb, ()):
        import_verb(part)
    return module


_WORKER_PARTS = {"train": ("_quantize",)}


@contextmanager
def importing() -> Iterator[None]:
    """Import something large in the block.

    Python's collector of reference cycles stops meanwhile, and never looks again at what is imported: a million objects of
    which all stay. Looking for garbage among them takes a tenth of the time that a command needs before it begins.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
