"""The record of what a run depends on: against facts, folders and files that are given here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qvgen.config import UserError
from qvgen.run_identity import IDENTITY_FILE, Change, RunIdentity, continue_run, read_changes

FACTS = {"code.torch": "2.9.0", "model.transformer": "a" * 64, "data.clips": f"96 clips, {'b' * 64}"}
DATA = {"_target_": "qvgen.data.clip_source.ClipSource", "cache": "x", "fps": 8}
MODEL = {"_target_": "qvgen.models.wan.Wan", "path": "m", "lora": None}
PLAIN = {"bits": 3, "run_dir": "a", "data": DATA, "model": MODEL}


def begin(run_dir: Path) -> None:
    RunIdentity.begin(PLAIN, FACTS, commit="c" * 40).write(run_dir)


def test_equal_facts_go_on_and_leave_the_record_as_it_is(tmp_path: Path) -> None:
    begin(tmp_path)
    before = (tmp_path / IDENTITY_FILE).read_bytes()
    for force in (False, True):
        continue_run(tmp_path, dict(reversed(FACTS.items())), force=force, step=5)
    assert (tmp_path / IDENTITY_FILE).read_bytes() == before
    assert read_changes(tmp_path) == ()


def test_every_fact_that_differs_is_refused_with_both_values(tmp_path: Path) -> None:
    begin(tmp_path)
    before = (tmp_path / IDENTITY_FILE).read_bytes()
    here = FACTS | {"model.transformer": "9" * 64, "data.clips": f"48 clips, {'d' * 64}", "model.lora": "e" * 64}
    with pytest.raises(UserError) as refused:
        continue_run(tmp_path, here, force=False, step=5)
    message = str(refused.value)
    assert f"run_dir={tmp_path} depends on what is no longer the same" in message
    assert "model.transformer was aaaaaaaaaaaa and is 999999999999;" in message
    assert "data.clips was 96 clips, bbbbbbbbbbbb and is 48 clips, dddddddddddd;" in message
    assert "model.lora was none and is eeeeeeeeeeee" in message
    assert "resume=force" in message
    assert "code.torch" not in message
    assert "commit" not in message
    with pytest.raises(UserError, match=r"code\.qvgen was none and is 0\.2 \(it began with commit cccccccccccc\)"):
        continue_run(tmp_path, FACTS | {"code.qvgen": "0.2"}, force=False, step=5)
    with pytest.raises(UserError, match="model.transformer was aaaaaaaaaaaa and is none"):
        continue_run(tmp_path, {"code.torch": "2.9.0", "data.clips": FACTS["data.clips"]}, force=False, step=5)
    assert (tmp_path / IDENTITY_FILE).read_bytes() == before


def test_force_goes_on_and_the_record_says_so_from_then_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    begin(tmp_path)
    first = RunIdentity.read(tmp_path)
    other, third = FACTS | {"code.torch": "2.9.1"}, FACTS | {"code.torch": "3.0"}
    continue_run(tmp_path, other, force=True, step=40)
    assert "goes on at step 40 with other facts, as told: code.torch was 2.9.0 and is 2.9.1" in caplog.text
    continue_run(tmp_path, other, force=False, step=60)  # they are the run's own now
    with pytest.raises(UserError, match="code.torch was 2.9.1 and is 3.0"):
        continue_run(tmp_path, third, force=False, step=60)
    continue_run(tmp_path, third, force=True, step=60)
    assert read_changes(tmp_path) == (
        Change(step=40, name="code.torch", before="2.9.0", after="2.9.1"),
        Change(step=60, name="code.torch", before="2.9.1", after="3.0"),
    )
    last = RunIdentity.read(tmp_path)
    assert first is not None
    assert last is not None
    assert last.run == first.run  # its checkpoints are the run's still


def test_a_run_without_a_record_needs_force(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no identity\.json: nothing says .* resume=force"):
        continue_run(tmp_path, FACTS, force=False, step=7)
    assert list(tmp_path.iterdir()) == []
    continue_run(tmp_path, FACTS, force=True, step=7)
    (change,) = read_changes(tmp_path)
    assert (change.step, change.before) == (7, "not recorded")
    known = RunIdentity.read(tmp_path)
    assert known is not None
    assert known.run is None  # its checkpoints have no mark
    continue_run(tmp_path, FACTS, force=False, step=8)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"{", b"\xff\xfe", b'"facts"', b"null", b"3", "facts", "changes", "run"],
    ids=["empty", "list", "mapping", "cut", "no text", "text", "null", "number", "facts", "changes", "run"],
)
def test_a_damaged_record_is_named(content: bytes | str, tmp_path: Path) -> None:
    begin(tmp_path)
    file = tmp_path / IDENTITY_FILE
    if isinstance(content, str):
        stored = json.loads(file.read_text())
        stored[content] = [3]
        content = json.dumps(stored).encode()
    file.write_bytes(content)
    for force in (False, True):
        with pytest.raises(UserError, match=r"identity\.json is damaged .* resume=force"):
            continue_run(tmp_path, FACTS, force=force, step=7)
    assert file.read_bytes() == content


def test_the_mark_depends_on_what_counts_and_not_on_places() -> None:
    def mark(**changes: object) -> str | None:
        return RunIdentity.begin(PLAIN | changes, FACTS, commit=None).run

    moved = {"run_dir": "b", "data": {**DATA, "cache": "y"}, "model": {**MODEL, "path": "n"}}
    assert mark() == mark(**moved)
    assert mark() != mark(bits=4)
    assert mark() != mark(data={**DATA, "fps": 16})
    assert RunIdentity.begin(PLAIN, FACTS, commit=None).run != RunIdentity.begin(PLAIN, {}, commit=None).run


def test_a_part_of_the_facts_can_be_compared_alone(tmp_path: Path) -> None:
    begin(tmp_path)
    known = RunIdentity.read(tmp_path)
    assert known is not None
    known.check(
        {"model.transformer": "a" * 64}, run_dir=tmp_path, remedy="x", counts=lambda name: name == "model.transformer"
    )
    with pytest.raises(UserError, match="code.torch was 2.9.0 and is none; stop it$"):
        known.check(
            {"model.transformer": "a" * 64},
            run_dir=tmp_path,
            remedy="stop it",
            counts=lambda name: name != "data.clips",
        )
