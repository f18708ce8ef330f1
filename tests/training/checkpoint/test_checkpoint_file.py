"""Checkpoints that are not what they are said to be: every kind of damage, made byte by byte in a real file.

Whatever is let through must be the very state that was saved. Checked against the state itself.
"""

from __future__ import annotations

import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qvgen.config import UserError
from qvgen.training.checkpoint.file import RUN_KEY, check_checkpoint
from qvgen.training.checkpoint_writer import AtomicCheckpointIO

RUN = "5" * 64
NAME = "step-00000006.ckpt"
FLIPS = 150
"""Of each kind, drawn by a seed; single bits."""


def state(**changes: Any) -> dict[str, Any]:
    weights = {f"student.{name}": torch.arange(float(size)) for name, size in (("a", 40), ("b", 7), ("c", 1))}
    moments = {"state": {0: {"step": torch.tensor(6.0), "exp_avg": torch.ones(40, dtype=torch.bfloat16)}}}
    return {
        "global_step": 6, RUN_KEY: RUN, "state_dict": weights, "optimizer_states": [moments],
        "lr_schedulers": [{"last_epoch": 6}], **changes,
    }  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    AtomicCheckpointIO().save_checkpoint(state(), tmp_path / NAME)
    return tmp_path / NAME


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return type(left) is type(right) and left == right


def test_a_whole_checkpoint_is_read(path: Path) -> None:
    assert same(check_checkpoint(path, run=RUN), state())
    assert same(check_checkpoint(path, run=None), state())


def regions(path: Path) -> dict[str, list[int]]:
    """Kinds of bytes of the file -> their places."""
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries, directory = archive.infolist(), archive.start_dir
    found: dict[str, list[int]] = {"tensors": [], "pickle": [], "other entries": [], "local headers": [], "padding": []}
    for entry in entries:
        name_size, extra_size = struct.unpack_from("<HH", content, entry.header_offset + 26)
        names = entry.header_offset + 30 + name_size
        begin = names + extra_size
        kind = (
            "pickle"
            if entry.filename.endswith(".pkl")
            else "tensors"
            if "/data/" in entry.filename
            else "other entries"
        )
        found[kind] += range(begin, begin + entry.file_size)
        found["local headers"] += range(entry.header_offset, names)
        found["padding"] += range(names, begin)
    found["central directory"] = list(range(directory, len(content)))
    return found


@pytest.mark.parametrize(
    "kind", ["tensors", "pickle", "other entries", "local headers", "padding", "central directory"]
)
def test_a_flipped_bit_is_found_or_changes_nothing(kind: str, path: Path) -> None:
    whole, places = path.read_bytes(), regions(path)[kind]
    draw = random.Random(kind)
    refused, said = 0, set()
    for place in draw.sample(places, min(FLIPS, len(places))):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            assert same(check_checkpoint(path, run=RUN), state())
        except UserError as error:
            refused += 1
            said.add(str(error).partition(" (")[0])
    if kind in ("tensors", "pickle", "other entries"):
        assert refused == min(FLIPS, len(places))
    assert refused == 0 or kind != "padding"
    assert said <= {f"{path} is no checkpoint or damaged; delete it to resume from the one before"}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_cut_file_is_named(share: float, path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match="is no checkpoint or damaged; delete it to resume from the one before"):
        check_checkpoint(path, run=RUN)


@pytest.mark.parametrize("kind", ["garbage", "zip", "deflated", "plain", "folder"])
def test_what_is_no_checkpoint_is_named(kind: str, path: Path) -> None:
    if kind == "garbage":
        path.write_bytes(b"garbage" * 100)
    elif kind == "plain":
        torch.save({"weights": torch.ones(3)}, path)
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        entries = zipfile.ZipFile(path)
        contents = {name: entries.read(name) for name in entries.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if kind == "deflated" else zipfile.ZIP_STORED) as archive:
            for name, content in contents.items() if kind == "deflated" else {"a": b"b"}.items():
                archive.writestr(name, content)
    with pytest.raises(UserError, match=f"{path.name}.*(damaged; delete it|is missing.*; delete the folder)"):
        check_checkpoint(path, run=RUN)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"state_dict": {"student.a": 0}}, "state_dict.student.a"),
        ({"optimizer_states": [{"state": {0: {"exp_avg_sq": 0}}}]}, "optimizer_states.0.state.0.exp_avg_sq"),
    ],
)
def test_a_number_that_is_not_finite_is_named(value: float, changes: Any, name: str, path: Path) -> None:
    bad = torch.ones(3, 4, dtype=torch.bfloat16)
    bad[1, 2] = value

    def filled(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: filled(entry) for key, entry in part.items()}
        return [filled(entry) for entry in part] if isinstance(part, list) else bad

    AtomicCheckpointIO().save_checkpoint(state(**filled(changes)), path)
    with pytest.raises(UserError, match=rf"{path.name}.*{name}.*; delete it to resume from the one before"):
        check_checkpoint(path, run=RUN)


def test_another_name_another_run_and_no_run_are_refused(path: Path) -> None:
    with pytest.raises(UserError, match=r"mark of another run \(555555555555, here 777777777777\); delete it"):
        check_checkpoint(path, run="7" * 64)
    renamed = path.rename(path.with_name("step-00000009.ckpt"))
    with pytest.raises(UserError, match="step-00000009.ckpt holds optimizer step 6, its name says another"):
        check_checkpoint(renamed, run=RUN)
    renamed = renamed.rename(path.with_name("step-last.ckpt"))
    with pytest.raises(UserError, match="has no step in its name"):
        check_checkpoint(renamed, run=RUN)
    AtomicCheckpointIO().save_checkpoint({k: v for k, v in state().items() if k != RUN_KEY}, path)
    with pytest.raises(UserError, match="holds no run's mark; delete it"):
        check_checkpoint(path, run=RUN)
    check_checkpoint(path, run=None)  # of a run from before there were marks
