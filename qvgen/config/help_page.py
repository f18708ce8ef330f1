"""`qvgen VERB --help`: the groups with their options, and every key with its present value and its meaning on one line.

The values are those of the command line that asks, so `qvgen train init=gptq --help` shows the keys of ``init=gptq``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qvgen.config.compose import compose_plain, group_options
from qvgen.config.reference import SCHEMAS, section_rows

_WIDTH = 46
_SHOWN_VALUE = 30


def help_page(verb: str, overrides: Sequence[str], *, header: str) -> str:
    """The page as one text.

    Args:
        verb: The verb.
        overrides: `key=value` texts without sweeps.
        header: What the verb does, one line.

    Raises:
        UserError: Anything wrong with an override.
    """
    config = compose_plain(verb, overrides, resolve=False)
    config = _worked_out(config, OmegaConf.create(config))
    options = group_options(verb)
    lines = [f"qvgen {verb}: {header}", ""]
    if options:
        lines += ["Choose from each group (GROUP=NAME):", ""]
        lines += [f"  {group}: {', '.join(names)}" for group, names in sorted(options.items())]
        lines.append("")
    lines += ["Keys (KEY=VALUE) with the values of this command; all meanings and ranges: docs/configuration.md", ""]
    rows = list(section_rows(config, SCHEMAS[verb]))
    own, below = ([row for row in rows if ("." in row.key) is inside] for inside in (False, True))
    for row in (*own, *below):
        value = row.default if len(row.default) <= _SHOWN_VALUE else f"{row.default[: _SHOWN_VALUE - 3]}..."
        meaning = f"{_first_sentence(row.meaning)}{row.limits and f'; range {row.limits}'}"
        lines.append(f"  {f'{row.key}={value}':<{_WIDTH}} {meaning}".rstrip())
    return "\n".join(lines)


def _first_sentence(meaning: str) -> str:
    """The part of a meaning that fits one line: up to its first full stop or semicolon."""
    return re.split(r"\. |; |\.$", meaning, maxsplit=1)[0]


def _worked_out(plain: dict[str, Any], config: Any, prefix: str = "") -> dict[str, Any]:
    """A configuration with the values that its ``${...}`` stand for; one that needs what is not given yet stays as it is."""
    values: dict[str, Any] = {}
    for name, value in plain.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            values[name] = _worked_out(value, config, f"{key}.")
            continue
        try:
            asked = isinstance(value, str) and "${" in value
            values[name] = OmegaConf.select(config, key, default=value) if asked else value
        except OmegaConfBaseException:
            values[name] = value
    return values
