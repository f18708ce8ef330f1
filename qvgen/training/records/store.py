"""Where records lie: some are shipped with qvgen, others are kept in the user's cache folder as plans find them out.

    shipped.json     key's hash -> content; of conf/model, and held to the models themselves by a test
    FOLDER/*.json    {"sha256", "key", "content"}, a record; named by the hash of its key and of qvgen's sources

The folder is ``QVGEN_PLANS``, else the user's cache folder; ``QVGEN_PLANS=off`` looks nothing up and keeps nothing. A
file that is damaged, of other numbers than its checksum says, or of another key counts as none. Nothing here ever stops a
plan: what can't be read is found out again, and what can't be written is not kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from qvgen.config.plain_json import mapping, parse_json, read_bytes, text
from qvgen.run_directory import atomic_write
from qvgen.training.records.keys import NoKeyError, key_hash, key_text, own_sources

log = logging.getLogger(__name__)

VARIABLE, OFF = "QVGEN_PLANS", "off"
SHIPPED = Path(__file__).with_name("shipped.json")
MAX_RECORDS = 2000
"""Most records that are kept; beyond it the oldest tenth goes. A plan makes a handful of some kilobytes each."""

T = TypeVar("T")


def folder() -> Path | None:
    """Where records are kept; None: nowhere."""
    given = os.environ.get(VARIABLE)
    if given:
        return None if given == OFF else Path(given).expanduser()
    cached = os.environ.get("XDG_CACHE_HOME")
    return (Path(cached) if cached else Path.home() / ".cache") / "qvgen" / "plans"


def recorded(
    about: Callable[[], Mapping[str, Any]],
    *,
    read: Callable[[Any], T],
    find: Callable[[], T],
    write: Callable[[T], Any],
) -> T:
    """A record's answer, or one that is found out now and recorded.

    Args:
        about: Gives all that the answer depends on; see :func:`qvgen.training.records.keys.key_text`.
        read: Makes the answer from a record's plain content; raises ValueError where that is not of the right form.
        find: Finds the answer out.
        write: The answer as plain content; None: it is not recorded.
    """
    try:
        key = None if folder() is None else key_text(about())
    except NoKeyError as error:
        log.debug("no record: %s", error)
        key = None
    if key is None:
        return find()
    for content in (shipped().get(key_hash(key)), _kept(key)):
        if content is not None:
            try:
                return read(content)
            except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
                log.debug("a record that is none: %s", error)  # RuntimeError: sizes that torch refuses
    answer = find()
    if (content := write(answer)) is not None:
        _keep(key, content)
    return answer


@cache
def shipped() -> Mapping[str, Any]:
    """The shipped records: key's hash -> content; none where the file is not there or damaged."""
    try:
        return mapping(parse_json(read_bytes(SHIPPED), source=str(SHIPPED)), "records")
    except (OSError, ValueError) as error:
        log.debug("no shipped records: %s", error)
        return {}


def _file(key: str) -> Path | None:
    place = folder()
    return None if place is None else place / f"{key_hash(key + own_sources())}.json"


def whole_record(file: Path) -> dict[str, Any] | None:
    """A record's file as it was written; None where there is none that is whole."""
    try:
        record = mapping(parse_json(read_bytes(file), source=str(file)), "record")
        if text(record.get("sha256"), "sha256") != _checksum(record.get("content")):
            raise ValueError(f"{file} is damaged")
        _ = text(record.get("key"), "key"), record["content"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        log.debug("a record that is none: %s", error)
        return None
    return record


def _kept(key: str) -> Any:
    """Content of the user's record of a key; None where there is none."""
    file = _file(key)
    record = None if file is None else whole_record(file)
    return record["content"] if record is not None and record["key"] == key else None


def _keep(key: str, content: Any) -> None:
    file = _file(key)
    if file is None:
        return
    record = {"sha256": _checksum(content), "key": key, "content": content}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(record, separators=(",", ":")).encode())
        others = list(file.parent.glob("*.json"))
        if len(others) > MAX_RECORDS:
            for old in sorted(others, key=lambda other: other.stat().st_mtime)[: MAX_RECORDS // 10]:
                old.unlink(missing_ok=True)
    except OSError as error:
        log.debug("not recorded: %s", error)


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
