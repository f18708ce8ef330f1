"""Tables with random damage, of every form: read, or refused in one line; no other error reaches the user."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qvgen.data.captions import read_table
from qvgen.errors import UserError

ROWS = [("a.mp4", "a boat, at sea"), ("a.mp4", 'she says "hello"'), ("a.mp4", "日本の船"), ("a.mp4", "007")]
ROUNDS = 60


def table(form: str) -> bytes:
    """A whole table of a form."""
    if form == "csv":
        return ("video,caption\n" + "".join(f'{a},"{b.replace(chr(34), chr(34) * 2)}"\n' for a, b in ROWS)).encode()
    if form == "jsonl":
        return "\n".join(json.dumps({"video": a, "caption": b}, ensure_ascii=False) for a, b in ROWS).encode()
    if form == "json":
        return json.dumps([{"path": a, "cap": [b]} for a, b in ROWS], indent=1).encode()
    if form == "toml":
        return b'[general]\ncaption_extension = ".txt"\n[[datasets]]\nvideo_directory = "."\nnum_repeats = 2\n'
    file = io.BytesIO()
    if form == "parquet":
        pq.write_table(pa.table({"mp4": [b"1", b"2"], "caption": ["one", "two"]}), file)
    else:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name, content in {
                "a.mp4": b"1",
                "a.txt": b"one",
                "b.mp4": b"2",
                "b.json": b'{"caption": "two"}',
            }.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def damage(data: bytes, generator: random.Random) -> bytes:
    """One to three bits turned, bytes put in, or the end cut off."""
    changed = bytearray(data)
    for _ in range(generator.randint(1, 3)):
        place = generator.randrange(len(changed) + 1)
        kind = generator.choice(("turn", "put", "cut"))
        if kind == "turn" and place < len(changed):
            changed[place] ^= 1 << generator.randrange(8)
        elif kind == "put":
            changed[place:place] = generator.choice(
                (b'"', b",", b"\n", b"[", b"{", b"\0", b"\\ud800", b"null", b"/", b"\xe9")
            )
        elif kind == "cut":
            del changed[place:]
    return bytes(changed)


@pytest.mark.parametrize("form", ["csv", "jsonl", "json", "toml", "parquet", "tar"])
def test_damage_is_read_or_refused_in_one_line(form: str, tmp_path: Path) -> None:
    whole, generator = table(form), random.Random(form)
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.txt").write_text("a boat")
    path = tmp_path / f"t.{form}"
    path.write_bytes(whole)
    assert len(read_table(path)) >= 1
    refused = []
    for _ in range(ROUNDS):
        path.write_bytes(damage(whole, generator))
        try:
            for clip in read_table(path):
                with clip.local_file():
                    pass
        except UserError as error:
            refused.append(str(error))
    assert 0 < len(refused) < ROUNDS
    assert all(path.name in message and "\n" not in message for message in refused)
