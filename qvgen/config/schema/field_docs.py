"""Type, range and meaning of the fields of a configuration class, read from its source text.

Nothing is imported but the packages that a module lies in, so that ``--help`` answers at once: a model family would pull in
torch and diffusers. What is read is what the code runs by: the annotation, the ``Range`` inside of it
(:mod:`qvgen.config.schema.value_range`), and the lines of the docstring under ``Attributes:`` or ``Args:``. Base classes
and names that are imported from other modules are followed.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

Definition = ast.ClassDef | ast.FunctionDef | ast.Assign
Place = tuple[str, Definition]
"""A module's name, and what it defines."""

_WORDS = {
    "int": "whole number", "float": "number", "bool": "true or false", "str": "text", "Path": "path",
    "Bits": "2..8 or wXaY", "Prompts": "text, list of texts or file", "None": "null", "Any": "",
}  # fmt: skip
_LISTS = ("tuple", "list", "Sequence")


@dataclass(frozen=True, kw_only=True)
class FieldDoc:
    """The description of a field, known without constructing anything.

    Attributes:
        kind: Its type in words, for example ``whole number or null``; empty where any value is taken.
        limits: Text of its range; empty where it has none.
        meaning: The docstring's sentence, on one line, as it is written there; empty where there is none.
        section: ``module.Class`` whose fields are the keys below this one; None: it is no section.
        may_differ: The value of its :class:`qvgen.config.schema.may_differ.MayDiffer`; None: it has none.
    """

    kind: str
    limits: str
    meaning: str
    section: str | None
    may_differ: str | None = None


@cache
def field_docs(target: str) -> dict[str, FieldDoc]:
    """The fields of a class, or the parameters of a function, those of its base classes included.

    Args:
        target: ``module.Name``.

    Returns:
        Name -> what is said of it; empty where there is no such class or its source can't be read.
    """
    module, _, name = target.rpartition(".")
    place = _resolve(module, name)
    return {} if place is None else _of_definition(*place)


def _of_definition(module: str, node: Definition) -> dict[str, FieldDoc]:
    if isinstance(node, ast.Assign):
        return {}
    fields: dict[str, FieldDoc] = {}
    for base in reversed(node.bases) if isinstance(node, ast.ClassDef) else ():
        place = _resolve(module, base.id) if isinstance(base, ast.Name) else None
        if place is not None:
            fields.update(_of_definition(*place))
    meanings = _meanings(ast.get_docstring(node) or "")
    for name, annotation in _annotations(node):
        kind, limits, section = _described(annotation, module)
        meaning = meanings.get(name, fields[name].meaning if name in fields else "")
        fields[name] = FieldDoc(
            kind=kind,
            limits=limits,
            meaning=meaning,
            section=section or _referred(meaning, module),
            may_differ=_may_differ(annotation),
        )
    for name in meanings.keys() & fields.keys():  # a derived class may say more of an inherited field
        old = fields[name]
        fields[name] = replace(old, meaning=meanings[name])
    return fields


def _annotations(node: ast.ClassDef | ast.FunctionDef) -> Iterator[tuple[str, ast.expr]]:
    """Names and types of what a caller gives: parameters of a function or an ``__init__``, else the class's fields."""
    constructor = node if isinstance(node, ast.FunctionDef) else None
    for entry in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(entry, ast.FunctionDef) and entry.name == "__init__":
            constructor = entry
        elif (
            isinstance(entry, ast.AnnAssign)
            and isinstance(entry.target, ast.Name)
            and not entry.target.id.startswith("_")
            and "ClassVar" not in ast.unparse(entry.annotation)
        ):
            yield entry.target.id, entry.annotation
    for argument in (*constructor.args.args, *constructor.args.kwonlyargs) if constructor else ():
        if argument.annotation is not None:
            yield argument.arg, argument.annotation


def _described(node: ast.expr, module: str) -> tuple[str, str, str | None]:
    """Kind, limits and section of an annotation."""
    if isinstance(node, ast.Constant):
        return _WORDS.get(str(node.value), str(node.value)), "", None
    if isinstance(node, ast.BinOp):
        left, right = _described(node.left, module), _described(node.right, module)
        kinds = dict.fromkeys(filter(None, (left[0], right[0])))
        return " or ".join(kinds), left[1] or right[1], left[2] or right[2]
    if isinstance(node, ast.Name):
        return _named(node.id, module)
    if isinstance(node, ast.Subscript):
        return _subscripted(ast.unparse(node.value), node.slice, module)
    return "", "", None


def _named(name: str, module: str) -> tuple[str, str, str | None]:
    if name in _WORDS:
        return _WORDS[name], "", None
    place = _resolve(module, name)
    if place is None:
        return "", "", None
    if isinstance(place[1], ast.Assign):
        return _described(place[1].value, place[0])
    return "section", "", f"{place[0]}.{name}"


def _subscripted(outer: str, inner: ast.expr, module: str) -> tuple[str, str, str | None]:
    parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    if outer == "Annotated":
        kind, limits, section = _described(parts[0], module)
        return kind, next(filter(None, (_range_text(part, module) for part in parts[1:])), limits), section
    if outer == "Literal":
        values = [part.value for part in parts if isinstance(part, ast.Constant)]
        return ", ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in values), "", None
    if outer in _LISTS:
        kind, limits, _ = _described(parts[0], module)
        kind = f"({kind})" if " or " in kind and "wXaY" not in kind else kind
        return f"list of {kind}".removesuffix(" of "), limits, None
    return ("section" if outer in ("Mapping", "dict") else ""), "", None


def _may_differ(annotation: ast.expr) -> str | None:
    """The mark ``MayDiffer.NAME`` inside of ``Annotated[...]``, in lower case; None where there is none."""
    is_annotated = isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated"
    inner = annotation.slice if isinstance(annotation, ast.Subscript) and is_annotated else None
    extras = inner.elts[1:] if isinstance(inner, ast.Tuple) else []
    marks = [
        extra.attr for extra in extras if isinstance(extra, ast.Attribute) and ast.unparse(extra.value) == "MayDiffer"
    ]
    return marks[0].lower() if marks else None


def _range_text(node: ast.expr, module: str) -> str:
    """The first argument of ``Range(...)``, also where a name stands for it."""
    if isinstance(node, ast.Name):
        place = _resolve(module, node.id)
        return _range_text(place[1].value, place[0]) if place and isinstance(place[1], ast.Assign) else ""
    is_range = isinstance(node, ast.Call) and ast.unparse(node.func) == "Range" and bool(node.args)
    first = node.args[0] if is_range and isinstance(node, ast.Call) else None
    return str(first.value) if isinstance(first, ast.Constant) else ""


def _meanings(docstring: str) -> dict[str, str]:
    """The entries under ``Attributes:`` and ``Args:`` of a docstring, each on one line."""
    meanings: dict[str, str] = {}
    name, inside = "", False
    for line in inspect.cleandoc(docstring).splitlines():
        if line and not line.startswith(" "):
            name, inside = "", line in ("Attributes:", "Args:")
        elif inside and (entry := re.match(r" {4}(\w+): (.+)", line)):
            name = entry[1]
            meanings[name] = entry[2]
        elif inside and name and line.startswith(" " * 8):
            meanings[name] += f" {line.strip()}"
    return meanings


def _referred(meaning: str, module: str) -> str | None:
    """The class that a mapping's meaning says its keys are those of."""
    reference = re.search(r"[Kk]eys of :class:`([\w.]+)`", meaning)
    if reference is None:
        return None
    return reference[1] if "." in reference[1] else f"{module}.{reference[1]}"


@cache
def _tree(module: str) -> ast.Module | None:
    """The source of a module; None where there is none to read."""
    try:
        spec = importlib.util.find_spec(module)
        return ast.parse(Path(spec.origin).read_text(encoding="utf-8")) if spec and spec.origin else None
    except (ImportError, OSError, SyntaxError, ValueError):
        return None


def _resolve(module: str, name: str) -> Place | None:
    """Where a name of a module is defined; None where it is a builtin or can't be found."""
    tree = _tree(module)
    for node in tree.body if tree else ():
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return module, node
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _resolve(node.module, alias.name)
    return None
