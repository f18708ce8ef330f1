"""torchao_program, round_trip_program and sdnq_program one after the other in one process: imports take most of their time.

    dequantizers_program.py '{"torchao": [PACKED, OUT, ...], "sdnq": [PACKED, OUT, ...]}' PLAN.json

prints JSON with the answers of all three. SDNQ is imported when torchao's exports have been compared.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch


@torch.no_grad()
def compared(name: str, words: list[str]) -> list[Any]:
    """What a program says of each pair of folders."""
    compare = importlib.import_module(f"{name}_program").main
    return [compare(Path(one), Path(two)) for one, two in zip(words[::2], words[1::2], strict=True)]


if __name__ == "__main__":
    exports = json.loads(sys.argv[1])
    found = {"torchao": compared("torchao", exports["torchao"])}
    found["round_trip"] = importlib.import_module("round_trip_program").answers(Path(sys.argv[2]))
    found["sdnq"] = compared("sdnq", exports["sdnq"])
    print(json.dumps(found))
