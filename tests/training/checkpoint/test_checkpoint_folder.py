"""Sharded checkpoints: written by threads that stand for ranks, read back by any others, damaged in every file.

Checked against the tensors and values that were saved.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import HashStore, Store

from qvgen.config import UserError
from qvgen.errors import UnfitEnvironmentError
from qvgen.training.checkpoint import folder as checkpoint_folder
from qvgen.training.checkpoint import folder_reader as checkpoint_folder_reader
from qvgen.training.checkpoint import replaced_folder
from qvgen.training.checkpoint.exact_json import decode, encode
from qvgen.training.checkpoint.file import RUN_KEY, check_checkpoint
from qvgen.training.checkpoint.folder import take_snapshot, temporary_folder, write_folder
from qvgen.training.checkpoint.part import Share
from qvgen.training.checkpoint.saved_tensor import SavedTensor, load_tensors_, whole_values
from qvgen.training.checkpoint_writer import AtomicCheckpointIO, checkpoints
from qvgen.training.design.micro_batch import count_micro_batches_
from qvgen.training.distributed.sharding import rows_of
from qvgen.training.distributed.store_exchange import StoreExchange
from tests.training.checkpoint.test_checkpoint_file import same

RUN = "5" * 64
NAME = "step-00000006.ckpt"
FLIPS = 60
"""Single bits in each file, drawn by a seed."""


def tensors() -> dict[str, Tensor]:
    """One of each kind that a run has, and of shapes that leave processes with nothing."""
    draw = torch.Generator().manual_seed(0)
    return {
        "student.weight": torch.randn(10, 3, generator=draw),
        "student.one": torch.randn(1, generator=draw),
        "student.none": torch.empty(0, 4),
        "student.narrow": torch.randn(7, 2, 2, generator=draw).bfloat16(),
        "student.codes": torch.randint(-128, 128, (9, 5), generator=draw, dtype=torch.int8),
        "student.bytes": torch.randint(0, 256, (5, 3), generator=draw, dtype=torch.uint8),
    }


def state(found: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint as Lightning has it."""
    moments = {0: {"step": torch.tensor(6.0), "exp_avg": found["student.narrow"]}, 1: {}}
    return {
        "global_step": 6,
        RUN_KEY: RUN,
        "state_dict": {**found, "student.rank_gate": torch.tensor([1.0, 0.5])},
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999)}]}],
        "lr_schedulers": [{"last_epoch": 6, "base_lrs": [2e-3]}],
        "callbacks": {"EarlyStopping": {"best": torch.tensor(float("inf")), "patience": 3}},
    }


def write(path: Path, *, world_size: int, saved: dict[str, Any] | None = None, **failing: Any) -> list[BaseException]:
    """Write a checkpoint as so many ranks; what they raised."""
    store, raised = HashStore(), []

    def rank_writes(rank: int) -> None:
        shares: dict[str, Any] = {}
        for name, value in tensors().items():
            rows = rows_of(value.shape[0], rank=rank, world_size=world_size)
            shares[name] = Share(rows=value[rows], shape=value.shape, first_row=rows.start)
        exchange = StoreExchange(store, rank=rank, world_size=world_size)
        snapshot = take_snapshot(state(shares) | (saved or {}), run=RUN, rank=rank).on_host()
        try:
            write_folder(path, snapshot, rank=rank, world_size=world_size, exchange=exchange)
        except BaseException as error:  # looked at by the test
            raised.append(error)

    threads = [threading.Thread(target=rank_writes, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


class FakeStore(Store):
    """A store whose server is gone."""

    def set(self, key: str, value: str) -> None:
        raise RuntimeError("Broken pipe")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    assert not write(tmp_path / NAME, world_size=2)
    return tmp_path / NAME


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_whatever_number_of_processes_wrote_it_any_reads_its_rows(world_size: int, tmp_path: Path) -> None:
    assert not write(tmp_path / NAME, world_size=world_size)
    names = {f"rank-{rank + 1:05d}-of-{world_size:05d}" for rank in range(world_size)}
    files = {f"{name}.{ending}" for name in names for ending in ("json", "safetensors")} | {"index.json"}
    assert {file.name for file in (tmp_path / NAME).iterdir()} == files
    assert [file.name for file in tmp_path.iterdir()] == [NAME]
    wanted = state(tensors())
    assert same(whole_values(check_checkpoint(tmp_path / NAME, run=RUN)), wanted)
    assert same(AtomicCheckpointIO().load_checkpoint(tmp_path / NAME), wanted)
    mapped = AtomicCheckpointIO(mapped=True).load_checkpoint(tmp_path / NAME)["state_dict"]
    for name, value in tensors().items():
        assert isinstance(mapped[name], SavedTensor)
        assert (mapped[name].shape, mapped[name].dtype) == (value.shape, value.dtype)
        for others in (1, 2, 3, 4, 7):
            for rank in range(others):
                rows = rows_of(value.shape[0], rank=rank, world_size=others)
                assert torch.equal(mapped[name][rows], value[rows])
    assert torch.equal(mapped["student.rank_gate"], torch.tensor([1.0, 0.5]))


def test_plain_values_come_back_as_they_were() -> None:
    values = {
        "": None, "$dict": True, 3: (1, [2.5, ()]), -0.1: 0.1 + 0.2, (1, "a"): {"a": {}}, None: -0.0, True: 10**30,
        "floats": [5e-324, 1.7976931348623157e308, float("inf"), float("-inf"), 1e16, 123456789.123456789],
        "others": [b"\x00\xff", 1 + 2j, {1, 2}, frozenset((3,)), torch.bfloat16, torch.Size([2, 3]), "\ud800 \u00e9"],
        "order": OrderedDict(b=1, a=2), 7: {"b": 1, "a": [{}]},
    }  # fmt: skip
    text = json.dumps(encode(values, tensor=lambda name, value: None))
    found = decode(json.loads(text), tensor=lambda name: None)
    assert repr(found) == repr(values)
    assert list(found) == list(values)
    nan = decode(json.loads(json.dumps(encode([float("nan")], tensor=lambda name, value: None))), tensor=str)
    assert nan[0] != nan[0]


@pytest.mark.parametrize(
    "value", [torch.eye(2).to_sparse(), object(), Path("a"), [torch.nn.Linear(1, 1)], {"a": {3: lambda: 0}}]
)
def test_a_value_that_is_not_kept_is_refused_where_it_stands(value: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^callbacks/Mine[/a#03]* is a .*, which (a|no) .*checkpoint"):
        take_snapshot(state(dict(tensors())) | {"callbacks": {"Mine": value}}, run=RUN, rank=0)


@pytest.mark.parametrize("kind", ["index.json", "rank-00002-of-00002.json", "rank-00001-of-00002.safetensors"])
def test_a_flipped_bit_is_found_in_every_file(kind: str, path: Path) -> None:
    file = path / kind
    whole, draw = file.read_bytes(), random.Random(kind)
    for place in draw.sample(range(len(whole)), min(FLIPS, len(whole))):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{NAME}/.*delete the folder {NAME} to resume from the one before"):
            check_checkpoint(path, run=RUN)
    file.write_bytes(whole)
    check_checkpoint(path, run=RUN)


@pytest.mark.parametrize("kind", ["index.json", "rank-00001-of-00002.json", "rank-00002-of-00002.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "longer", "folder", "another run's"])
def test_a_damaged_missing_or_exchanged_file_is_named(kind: str, damage: str, path: Path, tmp_path: Path) -> None:
    file = path / kind
    content = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage == "another run's":
        other = tmp_path / "other" / NAME
        assert not write(other, world_size=2, saved={"global_step": 7, "state_dict": {}})
        shutil.copy(other / kind, file)
        if kind == "index.json":
            with pytest.raises(UserError, match=f"{NAME} holds optimizer step 7|rank-00001-of-00002.json is damaged"):
                check_checkpoint(path, run=RUN)
            return
    elif damage != "missing":
        shares = {"cut": content[: len(content) // 2], "empty": b"", "longer": content + b"\0"}
        file.write_bytes(shares[damage])
    with pytest.raises(UserError, match=rf"{kind} (is (damaged|missing)|can't be read)") as refused:
        check_checkpoint(path, run=RUN)
    assert damage == "folder" or f"delete the folder {NAME} to resume from the one before" in str(refused.value)


def test_fold_reads_the_weights_alone(path: Path) -> None:
    part = path / "rank-00001-of-00002.safetensors"
    content = bytearray(part.read_bytes())
    size = int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8 : 8 + size])["optimizer_states/#0/state/#0/exp_avg"]["data_offsets"]
    assert end > begin
    content[8 + size + begin] ^= 1
    part.write_bytes(content)
    with pytest.raises(UserError, match=r"rank-00001-of-00002.safetensors is damaged"):
        check_checkpoint(path, run=RUN)
    found = check_checkpoint(path, run=RUN, only=("state_dict",))["state_dict"]
    assert same(whole_values(found), state(tensors())["state_dict"])


def test_another_name_run_or_version_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"mark of another run \(555555555555, here 777777777777\)"):
        check_checkpoint(path, run="7" * 64)
    renamed = path.rename(path.with_name("step-00000009.ckpt"))
    with pytest.raises(UserError, match="holds optimizer step 6, its name says another"):
        check_checkpoint(renamed, run=RUN)
    monkeypatch.setattr(checkpoint_folder_reader, "VERSION", 2)
    with pytest.raises(UserError, match="its version is 1, and this qvgen reads 2"):
        check_checkpoint(renamed, run=RUN)


def test_a_number_that_is_not_finite_is_named(tmp_path: Path) -> None:
    bad = {"optimizer_states": [{"state": {0: {"exp_avg": torch.tensor([1.0, float("nan")])}}}]}
    assert not write(tmp_path / NAME, world_size=2, saved=bad)
    with pytest.raises(UserError, match=r"rank-00001-of-00002.safetensors: .*exp_avg', float32 \[2\], holds 1 NaN"):
        check_checkpoint(tmp_path / NAME, run=RUN)


def test_a_full_disk_of_any_process_is_said_by_all_and_nothing_is_left(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file: file.read_bytes() for file in path.iterdir()}
    write_part = checkpoint_folder.write_part

    def full(folder: Path, shares: Any, *, rank: int, world_size: int) -> str:
        if rank == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "rank-00002-of-00002.safetensors"))
        return write_part(folder, shares, rank=rank, world_size=world_size)

    monkeypatch.setattr(checkpoint_folder, "write_part", full)
    for target in (path, path.with_name("step-00000009.ckpt")):  # one that stands there stays as it is
        raised = write(target, world_size=3)
        assert len(raised) == 3
        wanted = "cannot write it, No space left on device (rank-00002-of-00002.safetensors)"
        assert {(type(error), error.strerror, error.filename) for error in raised} == {(OSError, wanted, str(target))}
    assert [file.name for file in path.parent.iterdir()] == [NAME]
    assert {file: file.read_bytes() for file in path.iterdir()} == before


def test_any_other_failure_of_a_process_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_part = checkpoint_folder.write_part

    def lost(folder: Path, shares: Any, *, rank: int, world_size: int) -> str:
        if rank == 1:
            raise RuntimeError("device lost\nmore")
        return write_part(folder, shares, rank=rank, world_size=world_size)

    monkeypatch.setattr(checkpoint_folder, "write_part", lost)
    raised = write(tmp_path / NAME, world_size=2)
    assert {str(error) for error in raised} == {f"{tmp_path / NAME}: rank 1 cannot write its part (device lost more)"}
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_no_checkpoint_and_goes_with_the_next_save(tmp_path: Path) -> None:
    left = temporary_folder(tmp_path / "step-00000003.ckpt")
    left.mkdir()
    (left / "index.json").write_text("{}")
    (tmp_path / ".step-00000002.ckpt.old.tmp").mkdir()
    assert checkpoints(tmp_path) == []
    assert not write(tmp_path / NAME, world_size=2)
    assert [file.name for file in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_checkpoint_of_the_same_step_is_replaced_by_either_kind(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(replaced_folder, "_exchange", lambda left, right: False)
    path = tmp_path / NAME
    AtomicCheckpointIO().save_checkpoint(state(tensors()), path)
    for world_size in (2, 3):
        assert not write(path, world_size=world_size)
        assert len(list(path.iterdir())) == 2 * world_size + 1
    AtomicCheckpointIO().save_checkpoint(state(tensors()), path)
    assert path.is_file()
    assert same(check_checkpoint(path, run=RUN), state(tensors()))
    assert [file.name for file in tmp_path.iterdir()] == [NAME]
    assert not write(path, world_size=2)
    AtomicCheckpointIO().remove_checkpoint(path)
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_gone_is_said() -> None:
    store = FakeStore()
    with pytest.raises(UnfitEnvironmentError, match="lost each other: Broken pipe"):
        StoreExchange(store, rank=0, world_size=1)(1)


def test_tensors_go_into_a_model_module_by_module(path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    wanted = {name: value + 1 for name, value in model.state_dict().items()}
    load_tensors_(model, wanted)
    assert same(dict(model.state_dict()), wanted)
    load_tensors_(model, {"0.bias": torch.zeros(2)}, strict=False)
    assert not model.state_dict()["0.bias"].any()
    with pytest.raises(RuntimeError, match=r"0.weight is missing"):
        load_tensors_(model, {"0.bias": torch.zeros(2)})
    with pytest.raises(KeyError, match="2.bias"):
        load_tensors_(model, {"2.bias": torch.zeros(2)}, strict=False)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_tensors_(model, {"0.bias": torch.zeros(3)}, strict=False)


@pytest.mark.parametrize(("before", "now"), [(1, 2), (2, 1), (4, 4)])
def test_micro_batches_are_counted_anew(before: int, now: int) -> None:
    counts = {"ready": 3 * before, "completed": 3 * before - 1, "started": 3 * before, "processed": 3 * before}
    progress = {"total": dict(counts), "current": dict(counts), "is_last_batch": False}
    checkpoint = {"global_step": 3, "loops": {"fit_loop": {"epoch_loop.batch_progress": progress}}}
    count_micro_batches_(checkpoint, per_step=now)
    assert progress["total"] == progress["current"] == {
        "ready": 3 * now, "completed": 3 * now - 1, "started": 3 * now, "processed": 3 * now,
    }  # fmt: skip
