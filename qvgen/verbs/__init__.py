"""The verbs: straight stories of steps. The only rooms that know the order of things."""

from __future__ import annotations

import gc
import importlib
import sys
from types import ModuleType


def import_verb(verb: str) -> ModuleType:
    """Import the file of a verb, and with it torch and diffusers where the verb needs them.

    Python's collector of reference cycles stops meanwhile, and never looks again at what is imported: a million objects of
    which all stay. Looking for garbage among them takes a tenth of the time that a command needs before it begins.
    """
    name = f"{__name__}.{verb}"
    if name in sys.modules or not gc.isenabled():
        return importlib.import_module(name)
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()
