"""Checksums of files: against hashlib over the same bytes, with real files that are changed in every way that matters."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from qvgen import checksum
from qvgen.checksum import file_checksum, files_checksum


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A memory of this test's own, for files of every size."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checksum, "REMEMBERED_BYTES", 1)
    return tmp_path / "cache" / "qvgen" / "checksums"


def write(path: Path, content: bytes, *, age_s: float = 0.0) -> None:
    path.write_bytes(content)
    if age_s:
        state = path.stat()
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns - int(age_s * 1e9)))


def test_a_large_file_is_read_once_and_again_when_it_changed(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksum, "SETTLED_SECONDS", -1e9)  # every file has settled
    file = tmp_path / "file"
    write(file, b"weights")
    assert file_checksum(file) == hashlib.sha256(b"weights").hexdigest()
    (entry,) = memory.iterdir()
    entry.write_text("0" * 64)  # so that the memory is told from a reading
    assert file_checksum(file) == "0" * 64
    os.link(file, tmp_path / "other name")
    write(file, b"wEights", age_s=3600)  # as many bytes, and an older time of modification
    assert file_checksum(file) == hashlib.sha256(b"wEights").hexdigest()
    assert file_checksum(tmp_path / "other name") == hashlib.sha256(b"wEights").hexdigest()


def test_a_file_that_was_just_written_and_a_small_one_are_not_remembered(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "new", b"a")
    assert file_checksum(tmp_path / "new") == hashlib.sha256(b"a").hexdigest()
    monkeypatch.setattr(checksum, "SETTLED_SECONDS", -1e9)
    monkeypatch.setattr(checksum, "REMEMBERED_BYTES", 2)
    assert file_checksum(tmp_path / "new") == hashlib.sha256(b"a").hexdigest()
    assert not memory.exists()


@pytest.mark.parametrize("broken", ["damaged", "not writable"])
def test_a_memory_that_is_no_use_costs_time_alone(
    broken: str, tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksum, "SETTLED_SECONDS", -1e9)
    write(tmp_path / "file", b"a")
    if broken == "damaged":
        file_checksum(tmp_path / "file")
        for entry in memory.iterdir():
            entry.write_bytes(b"\xff")
    else:
        memory.parent.parent.write_bytes(b"a file where the folder should be")
    assert file_checksum(tmp_path / "file") == hashlib.sha256(b"a").hexdigest()


def test_several_files_count_by_names_and_bytes_wherever_they_lie(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("1.safetensors", "2.safetensors", "config.json"):
            write(tmp_path / folder / name, name.encode())
    wanted = files_checksum((tmp_path / "a").iterdir())
    assert files_checksum(sorted((tmp_path / "b").iterdir(), reverse=True)) == wanted
    assert len(wanted) == 64
    write(tmp_path / "b" / "2.safetensors", b"2.safetensorz")
    assert files_checksum((tmp_path / "b").iterdir()) != wanted
    (tmp_path / "a" / "config.json").rename(tmp_path / "a" / "conf.json")
    assert files_checksum((tmp_path / "a").iterdir()) != wanted
