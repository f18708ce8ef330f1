"""Docstrings are whole phrases: none begins with `Of`, `Those` or `What`, which leave out what they are about."""

import ast
import inspect
import operator
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "qvgen"
ROOMS = (
    "config", "data", "deploy", "evaluation", "initializers", "layers", "lowrank", "models", "quant", "quantizers",
)  # fmt: skip
ID = operator.attrgetter("name")
FRAGMENT = re.compile(r"(Of|Those|Its|What)\b")
ENTRY = re.compile(r"^ {4}\w+: (Of|of|Those)\b", re.MULTILINE)


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, those below an assignment too."""
    for node in ast.walk(tree):
        for child in getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            value = child.value if isinstance(child, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield child.lineno, value.value


def _fragments(source: str) -> list[int]:
    """Lines of the docstrings that begin with a fragment, or have an entry that does."""
    return [
        line
        for line, text in _docstrings(ast.parse(source))
        if FRAGMENT.match(text) or ENTRY.search(inspect.cleandoc(text))
    ]


@pytest.mark.parametrize("room", [*(PACKAGE / room for room in ROOMS), ROOT / "kernels" / "qvgen_kernels"], ids=ID)
def test_docstrings_say_what_they_are_about(room: Path) -> None:
    for path in sorted(room.rglob("*.py")):
        lines = _fragments(path.read_text(encoding="utf-8"))
        assert lines == [], f"{path}: name the thing first, then what it is of"


def test_a_fragment_is_seen_wherever_it_stands() -> None:
    assert _fragments('"""Of rows."""\n') == [1]
    assert _fragments('SIZE = 1\n"""What a row takes."""\n') == [2]
    assert _fragments('def f(x):\n    """Do it.\n\n    Args:\n        x: Of the rows.\n    """\n') == [2]
    assert _fragments('"""Size of a row: what it takes."""\n') == []
