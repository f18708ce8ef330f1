"""The error that is a user's to mend, and the suggestion that helps to mend it."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from pathlib import Path

DOES_NOT_FIT = 3
"""Exit code of a dry run whose plan is complete, and says that the run does not fit on this machine."""


class UnfitEnvironmentError(RuntimeError):
    """Something outside of the program keeps it from going on: another process, a machine, a network, a file system.

    The message names what was found; like a :class:`UserError` it ends a command with one line.
    """


class UserError(ValueError):
    """Bad input: the message is one line with the value, the constraint and the fix."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest the known name that is nearest to a mistyped one.

    A dotted key is also found by its last part alone, so that ``rank`` suggests ``phi.rank``.

    Args:
        name: What was typed.
        known: All names that would have been right.

    Returns:
        ``"; did you mean 'bits'?"``, or an empty string where nothing is near.

    Example:
        >>> did_you_mean("bitz", ["bits", "seed", "phi.rank"]), did_you_mean("rank", ["bits", "phi.rank"])
        ("; did you mean 'bits'?", "; did you mean 'phi.rank'?")
    """
    names = sorted(set(known) - {name})
    by_last_part: dict[str, str] = {}
    for candidate in names:
        by_last_part.setdefault(candidate.rpartition(".")[2], candidate)
    last_part = name.rpartition(".")[2]
    if last_part in by_last_part:
        return f"; did you mean {by_last_part[last_part]!r}?"
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not near:
        near = [by_last_part[part] for part in difflib.get_close_matches(last_part, by_last_part, n=1, cutoff=0.6)]
    return f"; did you mean {near[0]!r}?" if near else ""


def unknown_key(name: str, known: Iterable[str]) -> UserError:
    """The error of a key that nothing reads, with the nearest key and all of its section.

    Args:
        name: What was written, dotted.
        known: All keys that would have been right, dotted; more sections than the key's own may be among them.

    Example:
        >>> str(unknown_key("phi.rnk", ["bits", "phi.rank", "phi.keep"]))
        "unknown key 'phi.rnk'; did you mean 'phi.rank'? (phi has: keep, rank)"
    """
    names, (section, _, last) = set(known), name.rpartition(".")
    beside = [key for key in sorted(names) if section and key.rpartition(".")[0] == section]
    hint = did_you_mean(last, beside) or did_you_mean(last, names)  # whole names of one section are all alike
    listed = f" ({section} has: {', '.join(key.rpartition('.')[2] for key in beside)})" if beside else ""
    return UserError(f"unknown key {name!r}{hint}{listed}")


def one_line(error: BaseException) -> str:
    """What an error says, on one line; an OSError without its number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


OWN_PACKAGES = ("qvgen", "qvgen_kernels")
"""The packages of this repository; every other one is somebody else's."""


def missing_library(error: ModuleNotFoundError) -> str | None:
    """What to do about a library that this Python does not have; None where one of our own modules can't be found."""
    if error.name is None or error.name.partition(".")[0] in OWN_PACKAGES:
        return None
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "Makefile").is_file():
        remedy = f"first run: source {checkout / '.venv' / 'bin' / 'activate'} (make venv, in {checkout}, makes it)"
    else:
        remedy = "use the Python that qvgen was installed with, or install qvgen into this one with pip"
    return f"{sys.executable} has no module {error.name}; {remedy}"


def is_ours(error: RuntimeError) -> bool:
    """Whether an error has a class of this repository, whose message is for users; any other one is a bug."""
    return type(error).__module__.partition(".")[0] in OWN_PACKAGES
