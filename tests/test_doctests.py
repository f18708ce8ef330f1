"""Every worked example of the sources is run: what a docstring shows is what the code does."""

import doctest
import importlib
import importlib.util
import pkgutil
from pathlib import Path

import pytest

import qvgen
import qvgen_kernels


def _modules() -> list[str]:
    names = []
    for package in (qvgen, qvgen_kernels):
        names += [info.name for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    if importlib.util.find_spec("triton") is None:  # there are machines without a wheel of it
        names = [name for name in names if not name.startswith("qvgen_kernels.triton.")]
    return names


def _with_examples() -> list[str]:
    """Modules whose source holds an example, found without importing them."""
    found = []
    for name in _modules():
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and ">>> " in Path(spec.origin).read_text(encoding="utf-8"):
            found.append(name)
    return found


@pytest.mark.parametrize("name", _with_examples())
def test_examples_of_the_module(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = [test for name in _modules() for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(examples) >= 8
