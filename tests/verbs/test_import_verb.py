"""A verb's file is imported without collections of garbage, which go on afterwards, also where the import fails."""

import gc
import sys

import pytest

from qvgen.verbs import import_verb


def collections() -> int:
    return sum(generation["collections"] for generation in gc.get_stats())


def test_nothing_is_collected_while_a_verb_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verb that is imported anew: its own file alone, as all others that it needs are there."""
    import_verb("inspect")
    monkeypatch.delitem(sys.modules, "qvgen.verbs.inspect")
    threshold, frozen = gc.get_threshold(), gc.get_freeze_count()
    gc.set_threshold(10, 10, 10)  # a new object in ten would begin a collection
    try:
        before = collections()
        module = import_verb("inspect")
        found = collections() - before
    finally:
        gc.set_threshold(*threshold)
    assert callable(module.run)
    assert found == 0
    assert gc.get_freeze_count() > frozen
    assert gc.isenabled()


def test_a_verb_that_is_there_is_not_frozen_again_with_whatever_else_there_is() -> None:
    first = import_verb("inspect")
    frozen = gc.get_freeze_count()
    assert import_verb("inspect") is first
    assert gc.get_freeze_count() <= frozen


def test_collections_go_on_after_an_import_that_fails() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_verb"):
        import_verb("no_such_verb")
    assert gc.isenabled()


def test_who_has_switched_collections_off_finds_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "qvgen.verbs.inspect", raising=False)
    gc.disable()
    try:
        assert callable(import_verb("inspect").run)
        assert not gc.isenabled()
    finally:
        gc.enable()
