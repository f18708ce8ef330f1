"""Loading in stages: nothing of a file is used before its hash fits, the hash is what is reported, and times add up."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from qvgen.deploy import checkpoint, packed_file
from qvgen.deploy.checkpoint import load_packed, load_timed
from qvgen.deploy.manifest import read_manifest
from qvgen.deploy.packed_file import StageClock, file_checked
from qvgen.layers.swap import packed_layers
from tests.runs import train_config


@pytest.fixture
def packed(short_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(short_run / "packed", tmp_path / "packed"))


def damage(packed: Path) -> None:
    path = packed / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_config(packed: Path, **values: Any) -> None:
    content = json.loads((packed / "manifest.json").read_text())
    content["base"]["config"].update(values)
    (packed / "manifest.json").write_text(json.dumps(content))


def test_a_damaged_file_is_what_is_said_though_nothing_can_be_built(packed: Path) -> None:
    change_config(packed, in_channels=2**62)
    with pytest.raises(ValueError, match="builds no WanTransformer3DModel"):
        load_packed(packed)
    damage(packed)
    with pytest.raises(ValueError, match="the copy is damaged"):
        load_packed(packed)


def test_a_damaged_file_leaves_a_given_model_as_it_was(packed: Path) -> None:
    damage(packed)
    given = train_config().model.initial_transformer(0)
    before = {name: value.clone() for name, value in given.state_dict().items()}
    with pytest.raises(ValueError, match="the copy is damaged"):
        load_packed(packed, model=given)
    assert not packed_layers(given)
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())


def test_the_file_is_not_opened_before_its_hash_is_known(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    built = threading.Event()
    real = {"hash": packed_file.file_sha256, "map": checkpoint.map_tensors, "build": checkpoint.build_packed}

    def slow_hash(path: Path) -> str:
        assert built.wait(60), "the transformer is built only after the hash"
        time.sleep(0.2)
        events.append("hash")
        return real["hash"](path)

    def build(*args: Any, **options: Any) -> Any:
        events.append("build")
        built.set()
        return real["build"](*args, **options)

    def map_tensors(directory: Path) -> Any:
        events.append("map")
        return real["map"](directory)

    monkeypatch.setattr(packed_file, "file_sha256", slow_hash)
    monkeypatch.setattr(checkpoint, "build_packed", build)
    monkeypatch.setattr(checkpoint, "map_tensors", map_tensors)
    load_packed(packed)
    assert events == ["build", "hash", "map"]


def test_an_error_of_the_block_passes_where_the_hash_fits(packed: Path) -> None:
    with pytest.raises(ZeroDivisionError), file_checked(packed, read_manifest(packed), StageClock()):
        raise ZeroDivisionError


def test_the_parts_of_a_load_are_its_time(packed: Path) -> None:
    load_packed(packed)
    began = time.process_time(), time.perf_counter()
    _, seconds = load_timed(packed)
    cpu, wall = time.process_time() - began[0], time.perf_counter() - began[1]
    parts = (seconds.hash, seconds.build, seconds.map, seconds.prepack, seconds.other)
    assert all(part > 0 for part in parts)
    assert seconds.cpu == pytest.approx(sum(parts))
    assert 0 < seconds.cpu <= cpu  # the same clock, read outside of what it measures
    assert seconds.wall <= wall


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not list a process's mappings")
def test_canonical_tensors_are_pages_of_the_file(packed: Path) -> None:
    model = load_packed(packed)
    spans = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(packed / "model.safetensors"))
    ]
    assert spans
    for layer in packed_layers(model).values():
        assert any(first <= layer.codes.data_ptr() < last for first, last in spans)
