"""torchao_program and sdnq_program one after the other in one process, whose imports take most of the time of either.

dequantizers_program.py '{"torchao": [PACKED, OUT, ...], "sdnq": [PACKED, OUT, ...]}'; prints JSON with the answers of both.
SDNQ is imported when torchao's exports have been compared.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    found = {}
    with torch.no_grad():
        for name, words in json.loads(sys.argv[1]).items():
            compare = importlib.import_module(f"{name}_program").main
            found[name] = [compare(Path(one), Path(two)) for one, two in zip(words[::2], words[1::2], strict=True)]
    print(json.dumps(found))
