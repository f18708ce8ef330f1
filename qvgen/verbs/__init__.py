"""The verbs: straight stories of steps. The only rooms that know the order of things."""

from __future__ import annotations

import atexit
import gc
import importlib
import keyword
import sys
from types import ModuleType


def module_name(verb: str) -> str:
    """The name of a verb's file; a verb that is a keyword of Python has an underscore behind it: ``import_``."""
    return f"{verb}_" if keyword.iskeyword(verb) else verb


def import_verb(verb: str) -> ModuleType:
    """Import the file of a verb, and with it torch and diffusers where the verb needs them.

    Python's collector of reference cycles stops meanwhile, and never looks again at what is imported: a million objects of
    which all stay. Looking for garbage among them takes a tenth of the time that a command needs before it begins.
    """
    name = f"{__name__}.{module_name(verb)}"
    if name in sys.modules or not gc.isenabled():
        return importlib.import_module(name)
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # what stays frozen at the end is taken for lost by the libraries that count it
