"""Collect the records of a folder into the file that is shipped with qvgen.

python -m qvgen.training.records.shipped                             empties qvgen/training/records/shipped.json
QVGEN_PLANS=plans python train.py model=wan bits=4 dry_run=true      and so on: each plan finds out what it needs
python -m qvgen.training.records.shipped plans                       adds what the folder holds
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from qvgen.errors import UserError
from qvgen.training.records.keys import key_hash
from qvgen.training.records.store import SHIPPED, shipped, whole_record


def collect(folder: Path) -> dict[str, Any]:
    """Key's hash -> content, of the whole records of a folder.

    Raises:
        UserError: There is none.
    """
    records = [record for file in sorted(folder.glob("*.json")) if (record := whole_record(file)) is not None]
    if not records:
        raise UserError(f"{folder} holds no records; make some by dry runs with QVGEN_PLANS={folder}")
    return {key_hash(record["key"]): record["content"] for record in records}


def shipped_text(records: dict[str, Any]) -> str:
    """The file's content: a record a line, in the order of their keys."""
    lines = [f"{json.dumps(key)}:{json.dumps(records[key], separators=(',', ':'))}" for key in sorted(records)]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(arguments: list[str]) -> int:
    """Empty the shipped file, or add the records of the one folder that is named."""
    if len(arguments) > 1:
        sys.stderr.write("usage: python -m qvgen.training.records.shipped [FOLDER]\n")
        return 2
    try:
        records = {**shipped(), **collect(Path(arguments[0]))} if arguments else {}
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    SHIPPED.write_text(shipped_text(records), encoding="utf-8")
    sys.stdout.write(f"{len(records)} records in {SHIPPED}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
