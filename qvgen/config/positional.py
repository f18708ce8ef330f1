"""Words of a command line that stand for a key: `qvgen benchmark ptq`, `qvgen compare RUN...`, `qvgen export target=NAME`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

_OVERRIDE = re.compile(r"[+~]*[A-Za-z_][\w.@]*=")

_FLAGS_WITH_A_WORD = (
    "--cfg", "-c", "--package", "-p", "--info", "-i",
    "--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp",
)  # fmt: skip
"""Flags of hydra's whose next word is theirs."""


def name_positionals(verb: str, arguments: Sequence[str]) -> list[str]:
    r"""Turn words without a key into overrides.

    >>> name_positionals("benchmark", ["ptq", "videos=2"])
    ['what=ptq', 'videos=2']
    >>> name_positionals("benchmark", ["ptq", "model=minilm"])
    ['what=ptq', 'encoder=minilm']
    >>> name_positionals("compare", ["outputs/a", "it's b", "out=page"])
    ["runs=['outputs/a','it\\'s b']", 'out=page']
    >>> name_positionals("export", ["packed=run/packed", "target=comfy"])
    ['packed=run/packed', 'export=comfy']
    """
    if verb == "export":  # the group has the name of the verb, as every group has that of its folder in conf/
        return [re.sub(r"^target=", "export=", word) for word in arguments]
    if verb == "benchmark":  # what it measures in place of a video model is no file of conf/model
        arguments = [re.sub(r"^model=minilm$", "encoder=minilm", word) for word in arguments]
        if arguments and "=" not in arguments[0] and not arguments[0].startswith("-"):
            return [f"what={arguments[0]}", *arguments[1:]]
    if verb != "compare":
        return list(arguments)
    places = [
        index
        for index, word in enumerate(arguments)
        if _is_folder(word) and (not index or arguments[index - 1] not in _FLAGS_WITH_A_WORD)
    ]
    named = [f"runs=[{','.join(quoted(arguments[index]) for index in places)}]"] if places else []
    return [*named, *(word for index, word in enumerate(arguments) if index not in places)]


def _is_folder(word: str) -> bool:
    """Whether a word names a folder: it is no flag and no `key=value`, or there is a folder of this very name."""
    return not word.startswith("-") and (_OVERRIDE.match(word) is None or Path(word).is_dir())


def quoted(text: str) -> str:
    """Text between single quotes, as hydra's grammar reads it: a backslash is one unless it stands before a quote."""
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
    return "'" + escaped.replace("${", "\\${") + "'"
