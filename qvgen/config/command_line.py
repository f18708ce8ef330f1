"""The command that does a job again, as a shell reads it: for the line that a stopped run ends with, and for reports.

    python train.py -m bits=4,3 seed=1      its first job      python train.py bits=4 seed=1
                                            stopped            python train.py bits=4 seed=1 run_dir=outputs/... resume=true

The program is the one that was called: the interpreter with its flags and the script as they were typed, ``qvgen`` where
the shell finds that by itself. Variables of the environment are not part of it.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_PLAIN_VALUE = re.compile(r"[A-Za-z_./-][A-Za-z0-9_./+:@%-]*")
"""Text that hydra's grammar reads as this very text, unless it is a word of ``_WORDS``."""

_WORDS = ("true", "false", "null", "nan", "inf")

Value = str | bool | int | float | Path

_job: tuple[str, tuple[str, ...]] = ("", ())
"""Verb and overrides of the present job: a process works on one at a time."""

_runs_parts = False
"""Whether what runs now is a part of the present job, as a cell of a benchmark is."""


def command_line(verb: str, overrides: Iterable[str], *, changes: Mapping[str, Value] | None = None) -> str:
    """The command of one job, quoted for a POSIX shell.

    Args:
        verb: For example ``train``.
        overrides: The words behind the verb, as the program received them: ``key=value`` texts, and flags.
        changes: Keys with values that stand in place of what was typed for them, or behind everything else. A string or
            path is read back as that very text, whatever it looks like.

    Returns:
        One line.

    Example:
        >>> command_line("train", ["phi.ranks=[4,2]", "resume=false"], changes={"run_dir": Path("my/run"), "resume": True})
        "qvgen train 'phi.ranks=[4,2]' run_dir=my/run resume=true"
    """
    changes = dict(changes or {})
    kept = [text for text in overrides if _key(text) not in changes]
    added = [f"{key}={hydra_value(value)}" for key, value in changes.items()]
    return shlex.join([*_program(verb), *kept, *added])


def begin_job(verb: str, overrides: Iterable[str]) -> None:
    """Say which job this process works on from now on: one of a sweep's, as it would be typed alone."""
    global _job, _runs_parts
    _job, _runs_parts = (verb, tuple(overrides)), False


def job_command(*, changes: Mapping[str, Value] | None = None) -> str:
    """The command of the job that this process works on.

    Args:
        changes: See :func:`command_line`; those of a part of the job are left out (:func:`parts_of_job`).
    """
    return command_line(*_job, changes=None if _runs_parts else changes)


@contextmanager
def parts_of_job() -> Iterator[None]:
    """Run commands inside of the present job in here: it is the job's own command that continues each of them.

    An exception ends the job too, so that its last line, which is written later, still is about a part.
    """
    global _runs_parts
    _runs_parts = True
    yield
    _runs_parts = False


def _key(override: str) -> str | None:
    """``a.b`` of ``++a.b=1``; None of a flag."""
    return None if override.startswith("-") else override.lstrip("+~").partition("=")[0]


def hydra_value(value: Value) -> str:
    """A value in hydra's grammar; text is put into quotes where it would be read as something else."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    text = str(value)
    if _PLAIN_VALUE.fullmatch(text) and text.lstrip("+-").lower() not in _WORDS:
        number = re.fullmatch(r"[-.]?[.\d][\d_.eE+-]*", text)
        if not number:
            return text
    # Inside of quotes a backslash is one, unless it stands before a quote; `${` asks for another key's value.
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
    return "'" + escaped.replace("${", "\\${") + "'"


def _program(verb: str, *, argv: Sequence[str] | None = None, orig_argv: Sequence[str] | None = None) -> list[str]:
    """The words before the overrides."""
    argv = sys.argv if argv is None else argv
    orig_argv = sys.orig_argv if orig_argv is None else orig_argv
    script = Path(argv[0] if argv else "")
    words = list(orig_argv[: len(orig_argv) - len(argv) + 1])
    if script.name == "train.py" and verb == "train" and len(words) > 1:
        return words
    if script.name == "cli.py" and "-m" in words:
        return [*words, verb]
    if script.name == "qvgen":
        found = shutil.which("qvgen")
        if found is None or not script.exists() or not Path(found).samefile(script):
            return [str(script), verb]
    return ["qvgen", verb]
