"""One part in a process of its own: ``python -m gpu.part NAME OUT [--rehearse] [--slice I/N] [--warm]``.

Its rows are written to OUT/NAME.json (NAME-I.json of a slice) after each case. A case that raises becomes a row with its
error; after an error that leaves the card unusable for this process nothing more is tried.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from gpu.setting import Case, Setting, card_name

__all__ = ["run_part"]


def write_json(path: Path, value: object) -> None:
    """Write a file whole or not at all."""
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(value, indent=1))
    os.replace(beside, path)


def run_part(name: str, cases: Iterator[Case], setting: Setting, path: Path) -> str:
    """Run cases one after the other.

    Args:
        name: The part's name.
        cases: Labels and what measures.
        setting: Where.
        path: The JSON file.

    Returns:
        ``done``, or ``failed`` where the card could not be used any more.
    """
    result: dict[str, Any] = {
        "part": name, "state": "running", "card": card_name(setting), "torch": torch.__version__,
        "cuda": torch.version.cuda, "triton": _triton_version(), "rows": [],
    }  # fmt: skip
    write_json(path, result)
    began = time.monotonic()
    for label, case in cases:
        try:
            for row in case():
                result["rows"].append({"case": label, **row})
            setting.wait()
        except Exception as error:  # whatever a case raises is a finding, and the others go on
            text = " ".join(str(error).split())
            result["rows"].append({"case": label, "error": f"{type(error).__name__}: {text}"[:600]})
            try:
                setting.wait()
            except RuntimeError as broken:
                result |= {"state": "failed", "error": f"the card can't be used any more: {broken}"[:600]}
        result["seconds"] = time.monotonic() - began
        write_json(path, result)
        if result["state"] == "failed":
            return "failed"
    result["state"] = "done"
    write_json(path, result)
    return "done"


def _triton_version() -> str:
    try:
        from triton import __version__
    except Exception as error:  # a broken installation may raise anything
        return f"none ({type(error).__name__})"
    return str(__version__)


def main() -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--slice", default="0/1")
    parser.add_argument("--warm", action="store_true")
    given = parser.parse_args()
    index, count = map(int, given.slice.split("/"))
    setting = Setting(given.rehearse)
    # What a sum in bfloat16 loses on the way is no matter of the kernels that are measured.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if given.rehearse:
        import numpy as np

        np.seterr(all="ignore")  # numpy stands for the card, which makes infinities and NaNs without a word
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
    cases = import_module(f"gpu.{given.name}").cases(setting, warm=given.warm)
    suffix = f"-{index}" if count > 1 else ""
    path = given.out / f"{'warm-' if given.warm else ''}{given.name}{suffix}.json"
    return 0 if run_part(given.name, islice(cases, index, None, count), setting, path) == "done" else 1


if __name__ == "__main__":
    raise SystemExit(main())
