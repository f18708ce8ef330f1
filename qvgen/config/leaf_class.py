"""From the dotted name of a leaf's class to the class, and whether what it makes is what its group needs."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Any

from qvgen.errors import OWN_PACKAGES, UserError, did_you_mean, one_line


def find_class(name: str, *, key: str, is_users: bool) -> Any:
    """Import the class or function of a dotted name, ``mine.percentile.Percentile``.

    Args:
        name: One that may be followed; whoever calls has decided that.
        key: The group, for messages.
        is_users: Whether it is the user's own: then the present folder is searched for it too, behind all that is installed.

    Raises:
        UserError: There is no such module or class, or importing it raised something.
    """
    if is_users:
        _search_present_folder()
    parts = name.split(".")
    found = _import(parts[0], name=name, key=key)
    for index, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part):
            path = ".".join(parts[:index])
            try:
                is_module = hasattr(found, "__path__") and importlib.util.find_spec(path) is not None
            except (ImportError, ValueError):
                is_module = False
            if not is_module:
                hint = did_you_mean(part, [other for other in vars(found) if not other.startswith("_")])
                raise UserError(f"{key}._target_={name}: {'.'.join(parts[: index - 1])} has no {part}{hint}")
            found = _import(path, name=name, key=key)
        else:
            found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{key}._target_={name} is a {type(found).__name__}; name a class or a function")
    return found


def _search_present_folder() -> None:
    """Let modules be imported from the present folder, after all others, so that none of its files can replace a library."""
    here = os.getcwd()
    if not sys.flags.safe_path and not {here, ""} & set(sys.path):
        sys.path.append(here)


def _import(module: str, *, name: str, key: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # the code of whoever wrote the module, which may raise anything
        if module.partition(".")[0] in OWN_PACKAGES:
            raise
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            raise UserError(
                f"{key}._target_={name}: there is no module {module!r}; run the command in the folder that holds it, put "
                "that folder into PYTHONPATH, or install it"
            ) from error
        raise UserError(
            f"{key}._target_={name}: importing {module} failed: {type(error).__name__}: {one_line(error)}; "
            "debug=true shows where"
        ) from error


def check_made(made: object, *, kind: str, key: str, target: str) -> None:
    """Raise UserError unless an object is of a class, or has all that a protocol lists.

    Args:
        made: What a user's or plug-in's class made.
        kind: Dotted name of the class or protocol.
        key: The group, for messages.
        target: The class, for messages.
    """
    module, _, name = kind.rpartition(".")
    wanted: type = getattr(importlib.import_module(module), name)
    if not getattr(wanted, "_is_protocol", False):
        if not isinstance(made, wanted):
            raise UserError(
                f"{key}._target_={target} makes a {type(made).__name__}, which is no {kind}; derive its class from it"
            )
        return
    members = {
        member
        for base in wanted.__mro__
        if getattr(base, "_is_protocol", False)
        for member in (*vars(base), *vars(base).get("__annotations__", ()))
        if not member.startswith("_")
    }
    if missing := sorted(members - set(dir(made))):
        raise UserError(
            f"{key}._target_={target} makes a {type(made).__name__}, which lacks {', '.join(missing)}; see {kind}"
        )
