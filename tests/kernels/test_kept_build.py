"""What is kept of a compiler's work: made once, and again where an input, a flag or the name has changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.kernels.kept_build import kept_build

COMPILER = ["cp", "--preserve=mode"]
"""Any program that says its version."""


def test_it_is_made_once_for_the_same_inputs(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    source, made = tmp_path / "source.cpp", []
    source.write_text("one")

    def make(folder: Path) -> None:
        made.append(folder)
        shutil.copy(source, folder / "program")

    def build(*flags: str) -> Path:
        return kept_build(pytestconfig, "of_a_test", command=[*COMPILER, *flags], inputs=[source], make=make)

    root = pytestconfig.cache.mkdir("qvgen_of_a_test")
    shutil.rmtree(root)
    first = build()
    assert (first / "program").read_text() == "one"
    assert build() == first
    assert len(made) == 1
    source.write_text("two")
    second = build()
    assert (second / "program").read_text() == "two"
    assert [path.name for path in root.iterdir()] == [second.name], "only the newest is kept"
    assert build("--verbose") != second
    assert len(made) == 3
    shutil.rmtree(root)


def test_what_failed_is_not_kept(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("the compiler failed")

    for _ in range(2):
        with pytest.raises(OSError, match="the compiler failed"):
            kept_build(pytestconfig, "of_a_failure", command=COMPILER, inputs=[], make=fail)
    shutil.rmtree(pytestconfig.cache.mkdir("qvgen_of_a_failure"))
