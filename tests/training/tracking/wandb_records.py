"""Reads what wandb wrote while it was offline: LevelDB's log format, of protocol buffers."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_FILE_HEADER, _BLOCK = 7, 32768
_CHUNK = struct.Struct("<IHB")  # checksum, length, type: 1 whole, 2 first, 3 middle, 4 last
_WRITE_SECONDS = 60.0
"""How long the process may take to write them; it goes on after `finish` has returned."""


def read_records(folder: Path) -> list[Record]:
    """All records of the one session in an offline-run folder, once wandb's own process has written the last of them."""
    (path,) = folder.glob("*.wandb")
    deadline = time.monotonic() + _WRITE_SECONDS
    while not (records := _parse(path.read_bytes())) or records[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < deadline, f"{path} holds {len(records)} records and no end"
        time.sleep(0.05)
    return records


def _parse(data: bytes) -> list[Record]:
    """The records that lie whole in a file."""
    at, parts, records = _FILE_HEADER, b"", []
    while at + _CHUNK.size <= len(data):
        if _BLOCK - at % _BLOCK < _CHUNK.size:
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = _CHUNK.unpack_from(data, at)
        at += _CHUNK.size
        if at + length > len(data):
            break
        parts = (b"" if kind in (1, 2) else parts) + data[at : at + length]
        at += length
        if kind in (1, 4):
            records.append(Record.FromString(parts))
    return records


def history(records: list[Record]) -> list[dict[str, Any]]:
    """Rows of the history, in their order; ``_step`` is wandb's own number."""
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
            rows.append({**row, "_step": record.history.step.num})
    return rows


def summary(records: list[Record]) -> dict[str, Any]:
    """The summary, as its updates leave it; nested keys joined by a point."""
    values: dict[str, Any] = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            for item in record.summary.update:
                values[".".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return values


def run_record(records: list[Record]) -> Any:
    """Id, name, group, tags and configuration of the session."""
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"][:1]
    return run


def configuration(records: list[Record]) -> dict[str, Any]:
    """The configuration, as its updates leave it."""
    values: dict[str, Any] = {}
    for record in records:
        kind = record.WhichOneof("record_type")
        updates = record.config.update if kind == "config" else record.run.config.update if kind == "run" else ()
        for item in updates:
            values[".".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return values
