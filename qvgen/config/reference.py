"""docs/configuration.md: every key with its default, its values and its meaning, made from conf/ and the schema.

    python -m qvgen.config.reference > docs/configuration.md        (`make reference`)

Defaults are those of conf/, as they stand there; all else is :mod:`qvgen.config.schema.field_docs`. A key of conf/ of which
no class says anything is an error, so the page is whole.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from qvgen.config.conf_folder import conf_directory
from qvgen.config.schema import by_verb as schemas
from qvgen.config.schema.field_docs import FieldDoc, field_docs

SCHEMAS = {verb: f"{kind.__module__}.{kind.__qualname__}" for verb, kind in schemas.SCHEMAS.items()}
FIRST_VERBS = (
    "train",
    "ptq",
    "fold",
    "precompute",
    "generate",
    "evaluate",
    "inspect",
    "compare",
    "benchmark",
    "assets",
    "doctor",
)
FIRST_GROUPS = ("model", "data", "method", "init", "profile", "optim", "strategy", "logger")
"""Order of the page; what is not named here follows by name."""
INTERNAL = ("names", "typed", "defaults")
"""Keys of conf/ that hydra or qvgen fills in."""
_WRITTEN = {"metric": "metric.NAME"}
"""Groups of which a command takes several options -> how the keys of one of them are written."""
_SHOWN_GROUPS = {"generate": ("model",), "evaluate": ("model", "metric")}
"""Verb -> keys of its own file that are groups, and say something of their own there."""
_OWN_NAMES = {SCHEMAS["assets"]: ("names",)}

_RECIPE = "qvgen.config.schema.recipe.Recipe"
_UNKNOWN = FieldDoc(kind="", limits="", meaning="", section=None)
_LONGEST_DEFAULT = 72
_HEADER = """# Configuration

Every key of every command and every group: its default, the values that it takes, and what it means. This page is made
from the schema and conf/ by `make reference`; `qvgen VERB --help` shows the same for the options that are chosen.

A key is written as `KEY=VALUE` behind the command, a section's as `SECTION.KEY=VALUE`, a choice as `GROUP=NAME`.
`${...}` is the value of another key, `???` must be given. A list is written `[a,b]`, nothing is `null`. Ranges: `(0,
1]` holds 1 and not 0; `2..8` holds both ends. Where a table shows several defaults, each is followed by the options
that have it.
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One key.

    Attributes:
        key: As it is written on the command line, without its group's name.
        default: As conf/ has it, shortened where it is long.
        kind: Type in words.
        limits: Range; empty where it has none.
        meaning: What the key does.
    """

    key: str
    default: str
    kind: str
    limits: str
    meaning: str

    @property
    def values(self) -> str:
        """Type and range."""
        return ", ".join(filter(None, (self.kind, self.limits)))


def section_rows(section: Mapping[str, Any], target: str, *, prefix: str = "") -> Iterator[Row]:
    """The keys of a section in the order of conf/, with what a class says of them.

    Args:
        section: Values of conf/, or of a composed configuration; ``_target_`` is left out.
        target: ``module.Class`` whose fields they are.
        prefix: What stands before every key, for example ``phi.``.
    """
    fields = field_docs(target)
    if not prefix and "run" in fields:  # a benchmark's keys are those of a training run too
        fields = {**field_docs(SCHEMAS["train"]), **fields}
    for name, value in section.items():
        if name == "_target_" or (not prefix and name in INTERNAL and name not in _OWN_NAMES.get(target, ())):
            continue
        field = fields.get(name, _UNKNOWN)
        below = _RECIPE if name == "recipe" else field.section
        below = value.get("_target_", below) if isinstance(value, Mapping) else None
        if below is not None:
            yield from section_rows(value, str(below), prefix=f"{prefix}{name}.")
            continue
        meaning = plain_text(field.meaning)
        yield Row(key=f"{prefix}{name}", default=shown(value), kind=field.kind, limits=field.limits, meaning=meaning)


def shown(value: Any) -> str:
    """A value as it is written on the command line; a long one is described."""
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    if len(text) <= _LONGEST_DEFAULT:
        return text
    if isinstance(value, Mapping):
        return f"{{{', '.join(map(str, value))}}}"
    return f"{len(value)} entries" if isinstance(value, list) else f"{text[: _LONGEST_DEFAULT // 2]}..."


def plain_text(meaning: str) -> str:
    """A docstring's sentence as the command line speaks: without markup, and with null, true and false."""
    text = re.sub(r":\w+:`([^`]+)`", r"\1", meaning).replace("``", "`")
    for word, written in (("None", "null"), ("True", "true"), ("False", "false")):
        text = re.sub(rf"\b{word}\b", written, text)
    return text


def reference() -> str:
    """The whole page.

    Raises:
        ValueError: A key of conf/ without a meaning.
    """
    parts = [_HEADER]
    for verb in _ordered(SCHEMAS, FIRST_VERBS):
        target = SCHEMAS[verb]
        parts += [f"## qvgen {verb}\n", _wrapped(f"{_comment(_conf(f'{verb}.yaml'))}\n"), _verb_table(verb, target)]
    for group in groups():
        parts += [f"## {group}\n", *_group(group)]
    files = sorted((conf_directory() / "experiment").glob("*.yaml"))
    parts += ["## experiment\n", "Values of several keys under one name: `experiment=NAME`.\n", _list(files)]
    return "\n".join(parts)


def groups() -> list[str]:
    """The groups of conf/ whose files hold one section each, in the page's order."""
    folders = {path.parent.name for path in conf_directory().glob("*/*.yaml")}
    return _ordered(folders - {"experiment"}, FIRST_GROUPS)


def _ordered(names: Iterable[str], first: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda name: (first.index(name) if name in first else len(first), name))


def _verb_table(verb: str, target: str) -> str:
    known = groups()
    shown_groups = _SHOWN_GROUPS.get(verb, ())
    values = _values(_conf(f"{verb}.yaml"))
    own = {key: value for key, value in values.items() if key not in known or key in shown_groups}
    rows = list(section_rows(own, target))
    chosen = [
        entry for entry in yaml.safe_load(_text(_conf(f"{verb}.yaml"))).get("defaults", []) if isinstance(entry, dict)
    ]
    options = [f"`{group}={name}`" for entry in chosen for group, name in entry.items() if group in known and name]
    before = _wrapped(f"Chosen from the groups unless you choose: {', '.join(options)}.\n\n") if options else ""
    return before + _table("default", [(row, _code(row.default)) for row in rows])


def _group(group: str) -> Iterator[str]:
    """The options of a group, and one table of all their keys."""
    files = sorted((conf_directory() / group).glob("*.yaml"))
    yield _list(files)
    defaults: dict[Row, dict[str, str]] = {}
    for file in files:
        section = _values(file)
        for row in section_rows(section, str(section.get("_target_", _group_schema(group)))):
            without = replace(row, key=f"{_WRITTEN.get(group, group)}.{row.key}", default="")
            defaults.setdefault(without, {})[file.stem] = row.default
    rows = [(row, _defaults(of, files)) for row, of in defaults.items()]
    if rows:
        yield _table("default (of the options)", rows)


def _defaults(of: Mapping[str, str], files: Iterable[Path]) -> str:
    """The default of a key, with the options that have it where not all have the same."""
    values: dict[str, list[str]] = {}
    for option, default in of.items():
        values.setdefault(default, []).append(option)
    if len(values) == 1 and len(of) == len(list(files)):
        return _code(next(iter(values)))
    if len(values) > 1 and all(default == option for option, default in of.items()):
        return "the option's own name"
    return "; ".join(f"{_code(default)} ({', '.join(options)})" for default, options in values.items())


def _group_schema(group: str) -> str:
    """Class of a group whose files name none: the section of the schema."""
    return field_docs(SCHEMAS["train"]).get(group, _UNKNOWN).section or ""


def _table(default: str, rows: Iterable[tuple[Row, str]]) -> str:
    lines = [f"| key | {default} | values | meaning |", "|---|---|---|---|"]
    for row, shown_default in rows:
        if not row.meaning:
            raise ValueError(f"{row.key} of conf/ has no meaning; write it into the docstring of its class")
        cells = (f"`{row.key}`", shown_default, row.values, row.meaning)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _list(files: Iterable[Path]) -> str:
    return "\n".join(_wrapped(f"- `{file.stem}`: {_comment(file)}", indent="  ") for file in files) + "\n"


def _wrapped(text: str, *, indent: str = "") -> str:
    """A paragraph in lines of 120 characters, with the line ends that it ended with."""
    filled = textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return filled + "\n" * (len(text) - len(text.rstrip("\n")))


def _code(text: str) -> str:
    return f"`{text}`"


def _conf(name: str) -> Path:
    return conf_directory() / name


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _values(file: Path) -> dict[str, Any]:
    section = OmegaConf.to_container(OmegaConf.create(_text(file)), resolve=False)
    assert isinstance(section, dict)
    return {str(key): value for key, value in section.items()}


def _comment(file: Path) -> str:
    """The comment in the first lines of a file of conf/, which says what the file is."""
    lines = []
    for line in _text(file).splitlines():
        if not line.startswith("#"):
            break
        lines += [] if line.startswith("# @package") else [line.lstrip("# ")]
    return " ".join(lines)


if __name__ == "__main__":
    sys.stdout.write(reference())
